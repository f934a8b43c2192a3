"""Truncated encoding: the tower stops early, the projector runs on kept tokens, and the result does not change."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.families import FAMILIES
from tests.helpers.truncation import prepare_both
from tokenprune.adapter import Encoding, PackedTokens, adapters, find_adapter
from tokenprune.catalog import strategies
from tokenprune.component_reducer import ComponentReducer
from tokenprune.image_reducer import ImageReducer
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.models._capture.truncated_tower import ProjectedTokens
from tokenprune.models.idefics3 import Idefics3Adapter
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.models.llava_onevision import LlavaOnevisionAdapter
from tokenprune.pipeline import Pipeline
from tokenprune.prepared_call import PreparedCall
from tokenprune.reducer import TokenReducer
from tokenprune.requirements import list_missing_signals
from tokenprune.strategies import DivPrune, HiRED, VisPruner
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.merging import MeanOfRestMerging
from tokenprune.strategies.components.selection import TopAttentionSelection
from tokenprune.testing.examples import build_example, find_example

TRUNCATED = {
    name: kind
    for name, kind in adapters().items()
    if issubclass(kind, PlaceholderAdapter) and kind.projects_per_token and kind.supports_transformers()
}
SIZES = [[(112, 112)], [(60, 160), (150, 50)], [], [(40, 170)]]


@pytest.fixture(params=sorted(TRUNCATED))
def adapter(request: Any) -> PlaceholderAdapter:
    kind = TRUNCATED[request.param]
    model = find_example(kind).build_model()
    if hasattr(model.config, "vision_aspect_ratio"):
        model.config.vision_aspect_ratio = "anyres_max_9"  # the limit of the example shrinks canvases
    return kind(model)


def build_inputs(adapter: PlaceholderAdapter, sizes: Any = SIZES) -> dict[str, Any]:
    return find_example(type(adapter))(adapter).build_inputs(sizes)


def input_features(adapter: PlaceholderAdapter, call: PreparedCall) -> Tensor:
    """Return the features of all images that enter the LLM, `[kept, dim]`."""
    if "mm_encoder_outputs" not in call.inputs:  # nothing is kept
        return torch.zeros(1, 1)
    packed = call.inputs["mm_encoder_outputs"]["image"][adapter.features_field]
    return torch.cat([tokens.flatten(0, -2) for tokens in packed])


@contextmanager
def record_sizes(modules: Mapping[str, Any]) -> Iterator[dict[str, list[int]]]:
    """Record the number of input vectors of each module call."""
    sizes: dict[str, list[int]] = {name: [] for name in modules}

    def record(name: str) -> Any:
        return lambda module, args: sizes[name].append(args[0].shape[:-1].numel())

    hooks = [module.register_forward_pre_hook(record(name)) for name, module in modules.items()]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def token_kind(adapter: PlaceholderAdapter, inputs: Any, reducer: TokenReducer | None = None) -> type:
    """Return the class of the tokens of a truncated encoding: projected on demand, or immediately."""
    needs = Pipeline(reducer or HiRED(0.3), adapter).needs
    return type(adapter.encode(inputs, needs, truncated=True).tokens)


@pytest.mark.parametrize(
    "name", sorted(name for name, kind in strategies().items() if kind.stage.name in ("image", "projector"))
)
def test_tokens_and_features_equal_the_complete_encoding(adapter: PlaceholderAdapter, name: str) -> None:
    reducer = strategies()[name](0.3)  # type: ignore[call-arg]
    if list_missing_signals(reducer, adapter) or isinstance(reducer, ImageReducer):
        pytest.skip("the family does not provide the signals")
    if reducer.reads_question:
        reducer = replace(reducer, text_model=find_example(type(adapter))(adapter).build_text_model())
    complete, truncated = prepare_both(adapter, reducer, build_inputs(adapter))
    for expected, actual in zip(complete.selections, truncated.selections, strict=True):
        assert torch.equal(expected.kept, actual.kept)
    assert float((input_features(adapter, complete) - input_features(adapter, truncated)).abs().max()) < 1e-5
    assert torch.equal(complete.inputs["input_ids"], truncated.inputs["input_ids"])


def test_the_encodings_are_truncated(adapter: PlaceholderAdapter) -> None:
    inputs = build_inputs(adapter)
    with torch.no_grad():
        assert token_kind(adapter, inputs) is ProjectedTokens
        assert isinstance(adapter.encode(inputs, ()).tokens, PackedTokens)
        assert adapter.encode(inputs, ()).is_complete
        assert not adapter.encode(inputs, (), truncated=True).is_complete


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_dtypes(adapter: PlaceholderAdapter, attn: str, dtype: torch.dtype) -> None:
    adapter.model.set_attn_implementation(attn)
    adapter.model.to(dtype)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in build_inputs(adapter).items()
    }
    complete, truncated = prepare_both(adapter, HiRED(0.3), inputs)
    for expected, actual in zip(complete.selections, truncated.selections, strict=True):
        assert torch.equal(expected.kept, actual.kept)
    expected_features, features = input_features(adapter, complete), input_features(adapter, truncated)
    assert torch.allclose(
        expected_features.float(), features.float(), rtol=0.02, atol=1e-5 if dtype == torch.float32 else 2e-3
    )


def test_all_tokens_equal_the_tokens_of_the_model(adapter: PlaceholderAdapter) -> None:
    """If all tokens are projected in one call, they are bit-identical to the tokens of the model."""
    inputs = build_inputs(adapter)
    with torch.no_grad():
        complete, truncated = (adapter.encode(inputs, (), truncated=value).packed for value in (False, True))
    assert all(torch.equal(expected, actual) for expected, actual in zip(complete, truncated, strict=True))


@contextmanager
def collect_encodings(monkeypatch: pytest.MonkeyPatch, adapter: PlaceholderAdapter) -> Iterator[list[Encoding]]:
    """Collect the encodings that `encode` of an adapter returns inside the block."""
    encodings: list[Encoding] = []
    encode = adapter.encode

    def collect(*args: Any, **kwargs: Any) -> Encoding:
        encodings.append(encode(*args, **kwargs))
        return encodings[-1]

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "encode", collect)
        yield encodings


@pytest.mark.parametrize("budget", [1.0, 10_000])
def test_at_100_percent_the_encoding_is_complete(
    adapter: PlaceholderAdapter, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer runs once, and the output equals the output of the model; budgets can be ratios or counts."""
    inputs = build_inputs(adapter)
    layers = {f"{index}": layer.mlp for index, layer in enumerate(adapter.tower_layers)}
    with torch.no_grad():
        plain = adapter.model.base_model.get_image_features(**adapter.vision_arguments(inputs), return_dict=True)
        with collect_encodings(monkeypatch, adapter) as encodings, record_sizes(layers) as sizes:
            call = Pipeline(HiRED(budget), adapter).prepare(inputs, for_generate=True)
        assert [(encoding.is_complete, type(encoding.tokens)) for encoding in encodings] == [(True, PackedTokens)]
        assert all(len(calls) == 1 for calls in sizes.values())
        outputs = call.inputs["mm_encoder_outputs"]["image"]
        assert list(outputs) == list(plain)
        for actual, expected in zip(outputs[adapter.features_field], plain[adapter.features_field], strict=True):
            assert torch.equal(actual, expected)
        with collect_encodings(monkeypatch, adapter) as encodings:
            Pipeline(HiRED(0.99), adapter).prepare(inputs, for_generate=True)
        assert [(encoding.is_complete, type(encoding.tokens)) for encoding in encodings] == [(False, ProjectedTokens)]


def test_images_of_a_truncated_encoding_can_be_pickled(adapter: PlaceholderAdapter) -> None:
    """Pickling projects the features of an image once."""
    with torch.no_grad():
        inputs = build_inputs(adapter)
        images, complete = adapter.encode(inputs, (), truncated=True).images, adapter.encode(inputs, ()).images
        for image, complete_image in zip(images, complete, strict=True):
            restored = pickle.loads(pickle.dumps(image))
            assert torch.equal(restored.features, image.features)
            assert torch.equal(restored.features, complete_image.features)


def test_mixtures_equal_the_complete_encoding(adapter: PlaceholderAdapter) -> None:
    reducer = ComponentReducer(
        0.2, allocation=UniformAllocation(), selection=TopAttentionSelection(), merging=MeanOfRestMerging()
    )
    if list_missing_signals(reducer, adapter):
        pytest.skip("the projector pools")
    complete, truncated = prepare_both(adapter, reducer, build_inputs(adapter))
    assert any(selection.mixing is not None for selection in truncated.selections)
    assert float((input_features(adapter, complete) - input_features(adapter, truncated)).abs().max()) < 1e-5


def test_gradients_reach_the_tower(adapter: PlaceholderAdapter) -> None:
    inputs, grads = build_inputs(adapter, [[(112, 112)]]), []
    pipeline = Pipeline(HiRED(0.3), adapter)
    for encoding in (pipeline.encode(inputs), None):
        adapter.model.zero_grad()
        input_features(adapter, pipeline.prepare(inputs, encoding=encoding)).square().sum().backward()
        parameters = adapter.model.named_parameters()
        grads.append({name: value.grad.clone() for name, value in parameters if value.grad is not None})
    assert len(grads[0]) > 10
    for name in set(grads[0]) | set(grads[1]):
        expected, actual = grads[0][name], grads[1][name]
        # The gradient of a key bias is zero up to rounding: an offset of all keys does not change a softmax.
        slack = 1e-4 if name.endswith("k_proj.bias") else 1e-6
        assert float((expected - actual).norm()) <= 1e-4 * float(expected.norm()) + slack, name


def test_later_layers_do_not_run_and_dropped_tokens_are_not_projected() -> None:
    adapter = build_example(LlavaNextAdapter).adapter
    inputs = build_inputs(adapter, [[(112, 112)]])
    layers, last = adapter.tower_layers, adapter.feature_layer(inputs)
    modules = {
        **{f"mlp {index}": layer.mlp for index, layer in enumerate(layers)},
        "projector": adapter.projector.linear_1,
        "norm after the tower": adapter.tower.post_layernorm,
    }
    with torch.no_grad(), record_sizes(modules) as sizes:
        Pipeline(HiRED(40, allocation=UniformAllocation()), adapter).prepare(inputs, for_generate=True)
    all_tokens = 5 * (1 + 16)
    assert (len(layers), last) == (4, 2)
    assert sizes == {
        "mlp 0": [all_tokens],
        "mlp 1": [all_tokens],
        "mlp 2": [all_tokens],
        "mlp 3": [],
        "projector": [40],
        "norm after the tower": [],
    }


def test_reading_features_projects_all_tokens_once() -> None:
    adapter = build_example(LlavaNextAdapter).adapter
    inputs = build_inputs(adapter, [[(112, 112)]])
    for reducer, projected in ((VisPruner(10), 10), (DivPrune(10), 5 * 16)):
        with torch.no_grad(), record_sizes({"projector": adapter.projector.linear_1}) as sizes:
            Pipeline(reducer, adapter).prepare(inputs, for_generate=True)
        assert sizes == {"projector": [projected]}


def test_a_signal_of_a_later_layer_runs_that_layer(adapter: PlaceholderAdapter) -> None:
    inputs, layers = build_inputs(adapter, [[(112, 112)]]), adapter.tower_layers
    reducer = HiRED(0.3, selection=TopAttentionSelection(layer=-1))
    with torch.no_grad(), record_sizes({f"{index}": layer.mlp for index, layer in enumerate(layers)}) as sizes:
        Pipeline(reducer, adapter).prepare(inputs, for_generate=True)
    assert all(len(calls) == 1 for calls in sizes.values())


class SyncCounter(TorchDispatchMode):
    """Counts the operators that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return func(*args, **(kwargs or {}))


def test_the_number_of_host_waits_does_not_depend_on_the_budget() -> None:
    waits = []
    for budget, size in ((20, 1), (60, 1), (20, 3), (60, 3)):
        adapter = build_example(LlavaNextAdapter).adapter
        inputs = build_inputs(adapter, [[(112, 112)]] * size)
        pipeline = Pipeline(HiRED(budget, allocation=UniformAllocation()), adapter, keep_pixels=False)
        with torch.no_grad(), SyncCounter() as counter:
            pipeline.prepare(inputs, for_generate=True)
        waits.append(counter.count)
    assert waits[0] == waits[1]
    assert waits[2] == waits[3]
    assert waits[2] - waits[0] <= 2 * 16  # two more images


def test_hidden_states_are_freed_before_the_llm_runs(
    adapter: PlaceholderAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No garbage collection is required: a reference cycle would keep hidden states until the end of the prefill."""
    model, inputs, alive = adapter.model, build_inputs(adapter, [[(112, 112)]]), list[int]()
    model.generation_config.eos_token_id = None
    references: list[weakref.ref[Any]] = []
    run_tower = type(adapter).run_tower

    def run_and_track(*args: Any) -> Any:
        run = run_tower(*args)
        references.extend(map(weakref.ref, (run.tokens, run.tokens.hidden)))
        return run

    monkeypatch.setattr(type(adapter), "run_tower", run_and_track)
    layer = adapter.tower_layers[adapter.feature_layer(inputs) - 1]
    track = layer.register_forward_hook(lambda module, args, output: references.append(weakref.ref(output)))
    count = adapter.decoder.register_forward_pre_hook(
        lambda *_: alive.append(sum(reference() is not None for reference in references))
    )
    gc.collect()
    gc.disable()
    try:
        for reducer in (HiRED(0.3), DivPrune(0.3)):
            with reducer(model):
                model.generate(**inputs, max_new_tokens=1)
    finally:
        gc.enable()
        track.remove()
        count.remove()
    assert len(references) == 2 * 3  # the tokens, their hidden states, and the output of a layer
    assert alive == [0, 0]


def test_only_features_are_passed_to_the_llm(adapter: PlaceholderAdapter) -> None:
    """Other fields of the model output would stay in memory until the end of the prefill."""
    with torch.no_grad():
        call = Pipeline(HiRED(0.3), adapter).prepare(build_inputs(adapter), for_generate=True)
    assert list(call.inputs["mm_encoder_outputs"]["image"]) == [adapter.features_field]


@torch.no_grad()
def test_a_shrunk_canvas_is_encoded_completely() -> None:
    adapter = build_example(LlavaOnevisionAdapter).adapter
    kinds = [token_kind(adapter, build_inputs(adapter, [[size]])) for size in [(112, 112), (56, 112)]]
    assert kinds == [PackedTokens, ProjectedTokens]


@torch.no_grad()
def test_tiles_with_masked_patches_are_encoded_completely() -> None:
    adapter = build_example(Idefics3Adapter).adapter
    inputs = build_inputs(adapter, [[(112, 112)], [(56, 56)]])  # the second row has one tile and padding tiles
    pixels = inputs[adapter.pixels]
    full_mask = (pixels != 0).any(dim=2).flatten(2).any(dim=2)[:, :, None, None].expand(-1, -1, *pixels.shape[-2:])
    partial_mask = full_mask.clone()
    partial_mask[0, 0, 28:] = False
    kinds = [token_kind(adapter, {**inputs, "pixel_attention_mask": mask}) for mask in (full_mask, partial_mask)]
    assert not full_mask.all()
    assert kinds == [ProjectedTokens, PackedTokens]


def test_training_encodes_completely(adapter: PlaceholderAdapter) -> None:
    inputs = build_inputs(adapter, [[(112, 112)]])
    adapter.model.train()
    kinds = [token_kind(adapter, inputs)]
    with torch.no_grad():
        kinds.append(token_kind(adapter, inputs))
        adapter.model.eval()
        adapter.model.hf_device_map = {"a": 0, "b": "cpu"}  # accelerate moves weights module by module
        kinds.append(token_kind(adapter, inputs))
    assert kinds == [PackedTokens, ProjectedTokens, PackedTokens]


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["kernel", "mlp", "projector"])
@pytest.mark.parametrize("family", ["llava_next", "granite4_vision"])
def test_the_model_is_restored_after_an_exception(family: str, failure: type[BaseException], at: str) -> None:
    model = FAMILIES[family].model()
    adapter, inputs = find_adapter(model), FAMILIES[family].batch([(112, 112)])
    assert isinstance(adapter, PlaceholderAdapter)
    with torch.no_grad():
        model(**inputs)  # transformers installs its own capturing hooks at the first call
    last = adapter.tower_layers[adapter.feature_layer(inputs)]
    projector = adapter.projector if adapter.projector_path else last.self_attn.out_proj
    module = {"kernel": last.self_attn.q_proj, "mlp": last.mlp, "projector": projector}[at]

    def model_state() -> list[Any]:
        return [
            (
                sorted(vars(module)),
                id(getattr(module, "config", None)),
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
            )
            for module in model.modules()
        ]

    before = model_state()

    def fail(*args: Any) -> None:
        raise failure

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(failure), torch.no_grad():
        Pipeline(HiRED(0.3), adapter).prepare(inputs, for_generate=True)
    hook.remove()
    assert model_state() == before
    with torch.no_grad():
        Pipeline(HiRED(0.3), adapter).prepare(inputs, for_generate=True)
    assert model_state() == before


def test_too_few_images_raise(adapter: PlaceholderAdapter) -> None:
    inputs = build_inputs(adapter, [[(112, 112)], [(60, 160)]])
    with pytest.raises(ValueError, match=r"Image features and image tokens do not match|as a tensor of shape \[1, 2\]"):
        Pipeline(HiRED(0.3), adapter).prepare(inputs | {adapter.pixels: inputs[adapter.pixels][:-1]}, for_generate=True)


def test_too_few_tiles_raise() -> None:
    adapter = build_example(LlavaNextAdapter).adapter
    inputs = build_inputs(adapter, [[(112, 112)], [(112, 112)]])
    with pytest.raises(
        ValueError, match=r"pixel_values hold 2 images of \[4, 4\] tiles, but their layouts have \[5, 5\]"
    ):
        Pipeline(HiRED(0.3), adapter).prepare(
            inputs | {"pixel_values": inputs["pixel_values"][:, :-1]}, for_generate=True
        )
