"""Images are encoded only as far as kept tokens need it, and nothing about the answer changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import batch, tiny_model
from tokenprune.adapter import Encoding, adapters
from tokenprune.attach import Run
from tokenprune.budget import Budget
from tokenprune.catalogue import strategies
from tokenprune.image import EncodedImage, Signal
from tokenprune.models.idefics3 import Idefics3Adapter
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.models.llava_onevision import LlavaOnevisionAdapter
from tokenprune.models.placeholder import PlaceholderAdapter
from tokenprune.models.staged import StagedEncoding
from tokenprune.reducer import ComponentReducer, TokenReducer
from tokenprune.strategies import DivPrune, HiRED, VisPruner
from tokenprune.strategies.components.allocation import (
    BaseTileAllocation,
    GlobalTopAllocation,
    SubImagesAllocation,
    UniformAllocation,
    VisualContentAllocation,
)
from tokenprune.strategies.components.merging import MeanOfRest
from tokenprune.strategies.components.selection import TopAttention

STAGED = {
    name: kind
    for name, kind in adapters().items()
    if issubclass(kind, PlaceholderAdapter) and kind.staged and kind.runs()
}
SIZES = [[(112, 112)], [(60, 160), (150, 50)], [], [(40, 170)]]


@pytest.fixture(params=sorted(STAGED))
def adapter(request: Any) -> PlaceholderAdapter:
    kind = STAGED[request.param]
    model = kind.example().eval()
    if hasattr(model.config, "vision_aspect_ratio"):
        model.config.vision_aspect_ratio = "anyres_max_9"  # that of the example shrinks canvases
    return kind(model)


def inputs_of(adapter: PlaceholderAdapter, sizes: Any = SIZES) -> dict[str, Any]:
    return adapter.example_inputs(sizes)


def features(adapter: PlaceholderAdapter, reduced: Mapping[str, Any]) -> Tensor:
    """What is handed over for all images, `[kept, dim]`."""
    if "mm_encoder_outputs" not in reduced:  # nothing stays
        return torch.zeros(1, 1)
    found = reduced["mm_encoder_outputs"]["image"][adapter.features_in]
    return torch.cat([one.flatten(0, -2) for one in found])


def both(adapter: PlaceholderAdapter, reducer: TokenReducer, inputs: dict[str, Any]) -> tuple[Run, Run, Any, Any]:
    """Reduce the same call from a whole encoding and from a staged one."""
    whole, staged = Run(reducer, adapter, question="what is it"), Run(reducer, adapter, question="what is it")
    with torch.no_grad():
        one, _ = whole.reduced(dict(inputs), generating=True, encoding=whole.encode(inputs))
        other, _ = staged.reduced(dict(inputs), generating=True)
    return whole, staged, one, other


@contextmanager
def watched_encoding(monkeypatch: pytest.MonkeyPatch, adapter: PlaceholderAdapter) -> Iterator[list[Encoding]]:
    """Collect what `encode_staged` returns."""
    made: list[Encoding] = []
    original = adapter.encode_staged

    def collecting(*args: Any, **kwargs: Any) -> Encoding:
        made.append(original(*args, **kwargs))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "encode_staged", collecting)
        yield made


@contextmanager
def sizes_seen(modules: Mapping[str, Any]) -> Iterator[dict[str, list[int]]]:
    """Collect of how many vectors each module was given."""
    seen: dict[str, list[int]] = {name: [] for name in modules}

    def note(name: str) -> Any:
        return lambda module, args: seen[name].append(args[0].shape[:-1].numel())

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# --- nothing changes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(strategies()))
def test_the_same_tokens_and_the_same_features(adapter: PlaceholderAdapter, name: str) -> None:
    reducer = strategies()[name](0.3)  # type: ignore[call-arg]
    if Run(reducer, adapter).missing or reducer.stage == "image":
        pytest.skip("the family gives no such signals")
    if reducer.reads_question:
        reducer = replace(reducer, text_model=adapter.example_text_model())
    whole, staged, one, other = both(adapter, reducer, inputs_of(adapter))
    for first, second in zip(whole.selections, staged.selections, strict=True):
        assert torch.equal(first.kept, second.kept)
    assert float((features(adapter, one) - features(adapter, other)).abs().max()) < 1e-5
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert staged.account.images == whole.account.images


def test_the_tests_do_encode_in_stages(adapter: PlaceholderAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched_encoding(monkeypatch, adapter) as made:
        both(adapter, HiRED(0.2), inputs_of(adapter))
    assert [type(one) for one in made] == [StagedEncoding]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_dtypes(adapter: PlaceholderAdapter, attn: str, dtype: torch.dtype) -> None:
    adapter.model.set_attn_implementation(attn)
    adapter.model.to(dtype)
    inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs_of(adapter).items()}
    whole, staged, one, other = both(adapter, HiRED(0.3), inputs)
    for first, second in zip(whole.selections, staged.selections, strict=True):
        assert torch.equal(first.kept, second.kept)
    first, second = features(adapter, one), features(adapter, other)
    assert torch.allclose(first.float(), second.float(), rtol=0.02, atol=1e-5 if dtype == torch.float32 else 2e-3)


def test_everything_kept_is_bit_identical(adapter: PlaceholderAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count says only after the layout that nothing is dropped."""
    inputs = inputs_of(adapter)
    with torch.no_grad(), watched_encoding(monkeypatch, adapter) as made:
        run = Run(HiRED(10_000), adapter)
        reduced, rows = run.reduced(dict(inputs), generating=True)
        assert rows is None
        assert torch.equal(features(adapter, reduced), torch.cat(run.encode(inputs).packed))
    assert [type(one) for one in made] == [StagedEncoding]


def test_mixtures_are_those_of_the_whole(adapter: PlaceholderAdapter) -> None:
    reducer = ComponentReducer(0.2, allocation=UniformAllocation(), selection=TopAttention(), merging=MeanOfRest())
    if Run(reducer, adapter).missing:
        pytest.skip("the projector pools")
    _, staged, one, other = both(adapter, reducer, inputs_of(adapter))
    assert any(selection.mixing is not None for selection in staged.selections)
    assert float((features(adapter, one) - features(adapter, other)).abs().max()) < 1e-5


def test_gradients_reach_the_tower(adapter: PlaceholderAdapter) -> None:
    inputs, grads = inputs_of(adapter, [[(112, 112)]]), []
    run = Run(HiRED(0.3), adapter)
    for encoding in (run.encode(inputs), None):
        adapter.model.zero_grad()
        reduced, _ = run.reduced(dict(inputs), generating=False, encoding=encoding)
        features(adapter, reduced).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in adapter.model.named_parameters() if p.grad is not None})
    assert len(grads[0]) > 10
    for name in set(grads[0]) | set(grads[1]):
        first, second = grads[0][name], grads[1][name]
        # That of a key's bias is zero but for rounding: softmax does not see what all keys share.
        slack = 1e-4 if name.endswith("k_proj.bias") else 1e-6
        assert float((first - second).norm()) <= 1e-4 * float(first.norm()) + slack, name


@dataclass
class ReadsAll(VisualContentAllocation):
    """Looks at all tiles."""

    base_share: float = 1.0

    @property
    def needs(self) -> list[Signal]:
        return [one._replace(tiles="all") for one in super().needs]


# --- and less is done -------------------------------------------------------------------------------------------------


def test_dropped_tokens_see_neither_the_last_mlp_nor_the_projector() -> None:
    adapter = LlavaNextAdapter(LlavaNextAdapter.example().eval())
    inputs = inputs_of(adapter, [[(112, 112)]])
    layers, last = adapter.tower_layers, adapter.feature_layer(inputs)
    modules = {
        **{f"mlp {index}": layer.mlp for index, layer in enumerate(layers)},
        "last output": layers[last].self_attn.out_proj,
        "projector": adapter.projector.linear_1,
        "norm behind the tower": adapter.tower.post_layernorm,
    }
    with torch.no_grad(), sizes_seen(modules) as seen:
        Run(HiRED(40, allocation=UniformAllocation()), adapter).reduced(dict(inputs), generating=True)
    everything = 5 * (1 + 16)
    assert (len(layers), last) == (4, 2)
    assert seen == {
        "mlp 0": [everything],
        "mlp 1": [everything],
        "mlp 2": [40],
        "mlp 3": [],
        "last output": [40],
        "projector": [40],
        "norm behind the tower": [],
    }


def test_a_strategy_that_reads_all_outputs_saves_the_projector_only() -> None:
    adapter = LlavaNextAdapter(LlavaNextAdapter.example().eval())
    inputs = inputs_of(adapter, [[(112, 112)]])
    modules = {"mlp": adapter.tower_layers[2].mlp, "projector": adapter.projector.linear_1}
    with torch.no_grad(), sizes_seen(modules) as seen:
        Run(VisPruner(10), adapter).reduced(dict(inputs), generating=True)
    assert seen == {"mlp": [5 * 17], "projector": [10]}
    with torch.no_grad(), sizes_seen(modules) as seen:
        Run(DivPrune(10), adapter).reduced(dict(inputs), generating=True)
    assert seen == {"mlp": [5 * 17], "projector": [5 * 16]}


@pytest.mark.parametrize(
    ("allocation", "budget", "early", "late"),
    [
        (BaseTileAllocation(), 8, [1], [1]),  # nothing is read: the others are never embedded
        (SubImagesAllocation(), 8, [4], [4]),
        (VisualContentAllocation(base_share=1.0), 8, [1], [1]),  # the base tile is read, and the others never embedded
        (VisualContentAllocation(base_share=0.0), 64, [1, 4], [4]),  # it goes no further itself
        (VisualContentAllocation(), 80, [1, 4], [5]),  # all are paid for, and follow
        (VisualContentAllocation(layer=1), 80, [1, 4], [1, 4]),
        (VisualContentAllocation(layer=(0, 1), base_share=0.0), 64, [1, 4], [1, 4]),
        (VisualContentAllocation(layer="feature"), 80, [1, 4], [1, 4]),  # up to where tokens are chosen
        (VisualContentAllocation(layer=3), 80, [1, 4], [1, 4]),  # behind it
        (VisualContentAllocation(layer=3, base_share=0.0), 64, [1, 4], [1, 4]),
        (ReadsAll(), 8, [5], [1]),  # not the base tile alone: all are read before it is known
    ],
)
def test_tiles_without_a_budget_go_no_further(allocation: Any, budget: int, early: list[int], late: list[int]) -> None:
    adapter = LlavaNextAdapter(LlavaNextAdapter.example().eval())
    inputs = inputs_of(adapter, [[(112, 112)]])
    reducer = ComponentReducer(budget, allocation=allocation, selection=TopAttention())
    modules = {f"{index}": layer.mlp for index, layer in enumerate(adapter.tower_layers[:2])}
    with torch.no_grad(), sizes_seen(modules) as seen:
        Run(reducer, adapter).reduced(dict(inputs), generating=True)
    assert seen == {"0": [17 * tiles for tiles in early], "1": [17 * tiles for tiles in late]}
    whole, staged, one, other = both(adapter, reducer, inputs)
    assert torch.equal(whole.selections[0].kept, staged.selections[0].kept)
    assert float((features(adapter, one) - features(adapter, other)).abs().max()) < 1e-5


def test_a_batch_leaves_out_the_tiles_of_each_image(adapter: PlaceholderAdapter) -> None:
    """Images of different grids; in some families the base tile is encoded last."""
    reducer = ComponentReducer(3, allocation=VisualContentAllocation(base_share=1.0), selection=TopAttention())
    sizes = [[(112, 112)], [(60, 160), (150, 50)]]
    if Run(reducer, adapter).missing:
        pytest.skip("no attention")
    inputs, at = inputs_of(adapter, sizes), adapter.feature_layer({}) - 1
    layer = adapter.tower_layers[at]
    with torch.no_grad(), sizes_seen({"layer": layer}) as seen:
        whole, staged, one, other = both(adapter, reducer, inputs)
    length = sequence_length(adapter)
    assert seen["layer"] == [length * sum(s.geometry.tiles for s in whole.selections), length * 3]
    for first, second in zip(whole.selections, staged.selections, strict=True):
        assert torch.equal(first.kept, second.kept)
    assert float((features(adapter, one) - features(adapter, other)).abs().max()) < 1e-5


@pytest.mark.parametrize("layer", ["first", "feature", (0, -1)])
def test_the_base_tile_runs_ahead(adapter: PlaceholderAdapter, layer: Any) -> None:
    """Few tokens: some sub-images are paid for, in some pictures; the selection reads what the allocation read."""
    sizes = [[(112, 112)], [(60, 160), (150, 50)], [(112, 112)]]
    inputs = inputs_of(adapter, sizes)
    reducer = HiRED(2, allocation=VisualContentAllocation(layer=layer), selection=TopAttention(layer=layer))
    with torch.no_grad(), sizes_seen({"mlp": adapter.tower_layers[0].mlp}) as seen:
        whole, staged, one, other = both(adapter, reducer, inputs)
    length, tiles = sequence_length(adapter), sum(s.geometry.tiles for s in whole.selections)
    paid = [sum(granted > 0 for granted in s.granted_per_tile) for s in staged.selections]
    followed = [] if tiles == 4 else [sum(paid) - 4]  # some families have one tile an image
    assert seen["mlp"] == [length * number for number in (tiles, 4, *followed)]
    assert tiles == 4 or 4 < sum(paid) < tiles
    for first, second in zip(whole.selections, staged.selections, strict=True):
        assert torch.equal(first.kept, second.kept)
    assert float((features(adapter, one) - features(adapter, other)).abs().max()) < 1e-5


@pytest.mark.parametrize("both_read", [False, True])
def test_what_the_base_tile_alone_is_asked_for(
    adapter: PlaceholderAdapter, both_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tiles that follow it is captured only if somebody else reads it."""
    layers = ("first", "feature") if both_read else ("feature",)
    reducer, sizes = HiRED(0.9, selection=TopAttention(layer=layers)), [[(112, 112)], [(60, 160), (150, 50)]]
    with watched_encoding(monkeypatch, adapter) as made:
        whole, staged, _, _ = both(adapter, reducer, inputs_of(adapter, sizes))
    (encoding,) = made
    assert isinstance(encoding, StagedEncoding)
    run, kind = encoding.pending.run, staged.attention
    filled = [int(run.captured[kind, layer].flatten(1).any(dim=1).sum()) for layer in (0, run.last)]
    tiles = sum(one.geometry.tiles for one in whole.selections)
    assert filled == [tiles if both_read else 3, tiles]
    for first, second in zip(whole.selections, staged.selections, strict=True):
        assert torch.equal(first.kept, second.kept)


def test_features_are_not_there_while_base_tiles_run_ahead() -> None:
    class FeaturesOfAll(VisualContentAllocation):
        def content(self, image: EncodedImage) -> Tensor:
            return image.features[1:].sum(dim=(1, 2)).double()

    adapter = LlavaNextAdapter(LlavaNextAdapter.example().eval())
    reducer = ComponentReducer(8, allocation=FeaturesOfAll(), selection=TopAttention())
    with pytest.raises(ValueError, match=r"features of image 0 were read .* declare its signals for all tiles"):
        Run(reducer, adapter).reduced(inputs_of(adapter, [[(112, 112)]]), generating=True)


def sequence_length(adapter: PlaceholderAdapter) -> int:
    """Length of the sequence of one tile in the tower."""
    return int(adapter.has_cls) + adapter.token_grid[0] * adapter.token_grid[1] * adapter.pooling**2


def test_what_is_not_known_beforehand() -> None:
    adapter = LlavaNextAdapter(LlavaNextAdapter.example().eval())
    with torch.no_grad():
        (image,) = Run(HiRED(4), adapter).encode(inputs_of(adapter, [[(112, 112)]])).images
    pool = ComponentReducer(4, allocation=GlobalTopAllocation(), selection=TopAttention())
    for reducer in (pool, DivPrune(4), HiRED(Budget(4, newlines="counted"))):
        assert reducer.paid_tiles(image) is None
    paid = HiRED(4).paid_tiles(image)
    assert paid is not None
    assert paid.tolist() == [granted > 0 for granted in HiRED(4).reduce(image).granted_per_tile]


def test_a_shrunk_canvas_is_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = LlavaOnevisionAdapter(LlavaOnevisionAdapter.example().eval())
    with watched_encoding(monkeypatch, adapter) as made:
        for size in [(112, 112), (56, 112)]:
            both(adapter, HiRED(0.3), inputs_of(adapter, [[size]]))
    assert [type(one) for one in made] == [Encoding, StagedEncoding]


def test_tiles_with_masked_patches_are_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Idefics3Adapter(Idefics3Adapter.example().eval())
    inputs = inputs_of(adapter, [[(112, 112)], [(56, 56)]])  # one tile beside padding tiles
    pixels = inputs[adapter.pixels]
    whole = (pixels != 0).any(dim=2).flatten(2).any(dim=2)[:, :, None, None].expand(-1, -1, *pixels.shape[-2:])
    part = whole.clone()
    part[0, 0, 28:] = False
    with watched_encoding(monkeypatch, adapter) as made, torch.no_grad():
        for mask in (whole, part):
            Run(HiRED(0.3), adapter).reduced({**inputs, "pixel_attention_mask": mask}, generating=True)
    assert not whole.all()
    assert [type(one) for one in made] == [StagedEncoding, Encoding]


@pytest.mark.parametrize("reducer", [HiRED(1.0), HiRED(1.0, selection=TopAttention(layer=-1))], ids=["22", "23"])
def test_a_whole_encoding_runs_needed_layers_alone(adapter: PlaceholderAdapter, reducer: HiRED) -> None:
    inputs, layers = inputs_of(adapter, [[(112, 112)]]), adapter.tower_layers
    needed = max([adapter.feature_layer(inputs), *adapter.wanted(reducer.needs, adapter.feature_layer(inputs))])
    behind = {f"{index}": layer.mlp for index, layer in enumerate(layers)}
    with torch.no_grad(), sizes_seen(behind) as seen:
        encoding = Run(reducer, adapter).encode(inputs)
    assert [bool(seen[str(index)]) for index in range(len(layers))] == [index <= needed for index in range(len(layers))]
    with torch.no_grad():
        plain = adapter.model.base_model.get_image_features(
            **{name: inputs[name] for name in adapter.image_inputs if name in inputs}, return_dict=True
        )
    assert torch.equal(
        torch.cat(encoding.packed), torch.cat([one.flatten(0, -2) for one in plain[adapter.features_in]])
    )


def test_a_pooling_head_runs_only_if_it_is_read() -> None:
    adapter = LlavaNextAdapter(tiny_model("llava_next", tower="siglip"))
    inputs = dict(batch("llava_next", [(112, 112)], tower="siglip"))
    for attention, times in (("auto", 0), ("pooling", 1)):
        with torch.no_grad(), sizes_seen({"head": adapter.tower.head.mlp}) as seen:
            run = Run(HiRED(0.5, attention=attention), adapter)
            run.encode(inputs)
            run.reduced(dict(inputs), generating=True)
        assert len(seen["head"]) == 2 * times


class NumbersRead(TorchDispatchMode):
    """Counts the operators that make a host wait for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_as_often_for_many_tokens_as_for_few() -> None:
    waits = []
    for budget, size in ((20, 1), (60, 1), (20, 3), (60, 3)):
        adapter = LlavaNextAdapter(LlavaNextAdapter.example().eval())
        inputs = inputs_of(adapter, [[(112, 112)]] * size)
        run = Run(HiRED(budget, allocation=UniformAllocation()), adapter)
        run.selections.extend([None] * 8)  # type: ignore[list-item]  # no pictures for drawing
        with torch.no_grad(), NumbersRead() as read:
            run.reduced(dict(inputs), generating=True)
        waits.append(read.times)
    assert waits[0] == waits[1]
    assert waits[2] == waits[3]
    assert waits[2] - waits[0] <= 2 * 16  # a further picture


def test_what_was_encoded_is_gone_before_the_llm_runs(adapter: PlaceholderAdapter) -> None:
    """No collector is needed: a cycle would keep hidden states, keys and values through the prefill."""
    model, inputs, alive = adapter.model, inputs_of(adapter, [[(112, 112)]]), list[int]()
    model.generation_config.eos_token_id = None
    born: list[weakref.ref[Any]] = []
    layer = adapter.tower_layers[adapter.feature_layer(inputs) - 1]
    watch = layer.register_forward_hook(lambda module, args, output: born.append(weakref.ref(output)))
    count = adapter.decoder.register_forward_pre_hook(lambda *given: alive.append(sum(r() is not None for r in born)))
    gc.collect()
    gc.disable()
    try:
        for reducer in (HiRED(0.3), DivPrune(0.3), HiRED(1.0)):
            with reducer(model):
                model.generate(**inputs, max_new_tokens=1)
    finally:
        gc.enable()
        watch.remove()
        count.remove()
    assert len(born) == 3
    assert alive == [0, 0, 0]


def test_nothing_but_features_is_handed_over(adapter: PlaceholderAdapter) -> None:
    """Everything else of the model's own output would stay alive through the prefill, also at 100 %."""
    with torch.no_grad():
        for budget in (0.3, 1.0):
            reduced, _ = Run(HiRED(budget), adapter).reduced(inputs_of(adapter), generating=True)
            assert list(reduced["mm_encoder_outputs"]["image"]) == [adapter.features_in]


# --- where it cannot be -----------------------------------------------------------------------------------------------


def test_training_encodes_whole(adapter: PlaceholderAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(adapter, [[(112, 112)]])
    adapter.model.train()
    with watched_encoding(monkeypatch, adapter) as made:
        Run(HiRED(0.3), adapter).reduced(dict(inputs), generating=False)
        with torch.no_grad():
            Run(HiRED(0.3), adapter).reduced(dict(inputs), generating=False)
        adapter.model.eval()
        adapter.model.hf_device_map = {"a": 0, "b": "cpu"}  # accelerate moves weights module by module
        with torch.no_grad():
            Run(HiRED(0.3), adapter).reduced(dict(inputs), generating=False)
    assert [type(one) for one in made] == [Encoding, StagedEncoding, Encoding]


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["kernel", "tail", "projector"])
def test_nothing_is_left_behind(failure: type[BaseException], at: str) -> None:
    adapter = LlavaNextAdapter(LlavaNextAdapter.example().eval())
    inputs = inputs_of(adapter, [[(112, 112)]])
    last = adapter.tower_layers[adapter.feature_layer(inputs)]
    where = {"kernel": last.self_attn.q_proj, "tail": last.mlp, "projector": adapter.projector}[at]

    def state() -> list[Any]:
        return [
            (sorted(vars(module)), id(getattr(module, "config", None)), len(module._forward_pre_hooks))
            for module in adapter.model.modules()
        ]

    before = state()

    def fail(*args: Any) -> None:
        raise failure

    broken = where.register_forward_pre_hook(fail)
    with pytest.raises(failure), torch.no_grad():
        Run(HiRED(0.3), adapter).reduced(dict(inputs), generating=True)
    broken.remove()
    assert state() == before
    with torch.no_grad():
        Run(HiRED(0.3), adapter).reduced(dict(inputs), generating=True)
    assert state() == before


def test_too_few_tiles_are_refused() -> None:
    adapter = LlavaNextAdapter(LlavaNextAdapter.example().eval())
    inputs = inputs_of(adapter, [[(112, 112)], [(60, 160)]])
    with pytest.raises(ValueError, match=r"pixel_values hold 1 pictures of \[5\] tiles, but their layouts have \[5, "):
        Run(HiRED(0.3), adapter).reduced(inputs | {"pixel_values": inputs["pixel_values"][:1]}, generating=True)
