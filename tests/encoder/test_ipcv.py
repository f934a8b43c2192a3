"""IPCV: towers that drop and restore patches equal a loop over the halves of their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import collect_state
from tests.helpers.published import CASES, Case
from tokenprune import Composed
from tokenprune.adapter import find_adapter
from tokenprune.encoder.patches import PatchGroups, RemainingPatches
from tokenprune.encoder.restoration import DroppedPatches, list_dropped, nearest_kept, restore_dropped
from tokenprune.image import EncodedImage
from tokenprune.models._capture.hooks import replaced_forward
from tokenprune.models._capture.patch_reduction import find_geometry, join_groups
from tokenprune.strategies import FastV, HiRED, PixelPrune
from tokenprune.strategies.encoder import IPCV

OPTIONS = {"schedule": ((1, 0.35),), "neighbors": 3, "attended_layers": 1}
NAMES = ["qwen2_vl", "llava", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "llava_next", "pixtral"]
FAST = {"qwen2_vl", "llava"}


@pytest.fixture(params=[pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in NAMES])
def family(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]


def test_dropped_patches_follow_the_mean_change_of_their_neighbors() -> None:
    states = torch.tensor([[[0.0], [1.0], [5.0], [6.0], [2.0]]])
    kept = torch.tensor([[0, 2, 3]])
    assert list_dropped(kept, 5).tolist() == [[1, 4]]
    assert nearest_kept(states, kept, 2).tolist() == [[[0, 1], [0, 1]]]
    neighbors = torch.tensor([[[0, 2], [1, -1]]])
    dropped = DroppedPatches(torch.tensor([[1, 4]]), states[:, [1, 4]], states[:, [0, 2, 3]], neighbors)
    now = torch.tensor([[[10.0], [7.0], [10.0]]])
    assert restore_dropped(dropped, now).tolist() == [[[1.0 + (10 + 4) / 2], [2.0 + 2.0]]]


def test_images_with_few_patches_have_fewer_neighbors() -> None:
    parts = [
        PatchGroups(torch.tensor([[0]]), neighbors=torch.tensor([[[0]]])),
        PatchGroups(torch.tensor([[1, 3]]), neighbors=torch.tensor([[[1, 0], [0, 1]]])),
    ]
    joined = join_groups(parts, [2, 4])
    assert joined.kept.tolist() == [[0, 3, 5]]
    assert joined.neighbors is not None
    assert joined.neighbors.tolist() == [[[0, -1], [2, 1], [1, 2]]]


@pytest.mark.parametrize("number", CASES)
def test_patches_and_restored_states_equal_the_official_code(number: int) -> None:
    """The kept patches, their neighbors, and the states that attention and projector receive."""
    case = Case("ipcv", number)
    current, change = case["current"][None], (case["current"] - case["previous"])[None]
    image = EncodedImage(find_geometry(1, current.shape[1]), current, {("state_change", 2): change}, feature_layer=2)
    groups = IPCV(neighbors=case["topk"]).group(image, case["number"])
    assert groups.kept[0].tolist() == case["kept"].nonzero()[:, 0].tolist()
    assert groups.neighbors is not None
    assert torch.equal(groups.neighbors[0].sort(dim=1).values, case["neighbors"].sort(dim=1).values)
    patches = RemainingPatches.all(1, current.shape[1], "none", current.device)
    remaining, states = patches.apply(groups, current)
    assert torch.equal(states[0], current[0, case["kept"]])
    for name, result in (("middle", "attended"), ("last", "restored")):
        restored = remaining.restore(case[name][None], current)[0]
        assert (restored - case[result]).abs().max() <= 1e-6
        assert (current[0] - case[result]).abs().max() > 1


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="one layer"):
        IPCV(schedule=((1, 0.5), (2, 0.3)))
    with pytest.raises(ValueError, match="neighbors=0"):
        IPCV(neighbors=0)
    with pytest.raises(ValueError, match="first layer"):
        IPCV(schedule=((0, 0.5),)).list_steps(100, 4)
    assert [list(IPCV().list_steps(100, layers).items()) for layers in (32, 24, 4)] == [[(3, 35)], [(3, 35)], [(1, 35)]]


class WrittenTower:
    """Runs the layers of a tower by the rule of IPCV: loops over images and patches, with stored lists of states."""

    def __init__(self, adapter: Any, lengths: list[int], reducer: IPCV, prefix: int) -> None:
        self.adapter, self.lengths, self.reducer, self.prefix = adapter, lengths, reducer, prefix
        self.step = reducer.schedule[0][0]
        self.inputs: list[Tensor] = []

    def choose(self, previous: Tensor, current: Tensor) -> None:
        """Store the kept positions, the neighbors and the states at the step, for each sequence of patches."""
        self.kept, self.neighbors, self.stored = [], [], current.clone()
        for row in range(len(current)):
            start, kept = self.prefix, list(range(self.prefix))
            nearest: dict[int, list[int]] = {}
            for length in self.lengths:
                part = range(start, start + length)
                change = (current[row] - previous[row]).norm(dim=-1)
                chosen = sorted(sorted(part, key=lambda n: -float(change[n]))[: int(length * 35 / 100)])
                for number in set(part) - set(chosen):
                    distances = [(float((current[row, number] - current[row, n]).norm()), n) for n in chosen]
                    nearest[number] = [n for _, n in sorted(distances)[: self.reducer.neighbors]]
                kept += chosen
                start += length
            self.kept.append(kept)
            self.neighbors.append(nearest)

    def restore(self, states: Tensor) -> Tensor:
        """Return the states with dropped patches computed from the changes of their neighbors."""
        full = states.clone()
        for row, nearest in enumerate(self.neighbors):
            for number, neighbors in nearest.items():
                changes = [states[row, n] - self.stored[row, n] for n in neighbors]
                full[row, number] = self.stored[row, number] + sum(changes) / len(changes)
        return full

    def attend(self, layer: Any, call: Callable[[Tensor], Tensor], states: Tensor, allowed: Tensor | None) -> Tensor:
        """Return the input and the attention of a layer, in which only allowed patches are keys."""
        with replaced_forward(getattr(layer, self.adapter.tower_mlp_name), lambda x, *_: torch.zeros_like(x)):
            return call(states) if allowed is None else call_masked(call, states, allowed)

    def run(self, index: int, layer: Any, call: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """Return the output of a layer for all patches."""
        self.inputs.append(states)
        if index < self.step:
            return call(states)
        if index == self.step:
            self.choose(self.inputs[-2], states)
        keys = torch.zeros(states.shape[:2], dtype=torch.bool)
        for row, kept in enumerate(self.kept):
            keys[row, kept] = True
        is_full = index < self.step + self.reducer.attended_layers
        attended = self.attend(layer, call, states, None if is_full else keys)
        with zero_attention(layer, self.adapter.attention_name):
            return self.restore(call(attended))


class _KeyMask(torch.overrides.TorchFunctionMode):
    def __init__(self, allowed: Tensor) -> None:
        super().__init__()
        self.allowed, self.start = allowed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            part = self.allowed[:, None, None, self.start : self.start + args[1].shape[2]]
            self.start += args[1].shape[2]
            mask = options.get("attn_mask")
            mask = mask > -1 if mask is not None and mask.dtype != torch.bool else mask
            options["attn_mask"] = part if mask is None else part & mask
            options["attn_mask"] = options["attn_mask"] | ~options["attn_mask"].any(-1, keepdim=True)
        return func(*args, **options)


def call_masked(call: Callable[[Tensor], Tensor], states: Tensor, allowed: Tensor) -> Tensor:
    """Return the result of a call in which attention reads the allowed positions only."""
    with _KeyMask(allowed):
        return call(states)


@contextmanager
def zero_attention(layer: Any, name: str) -> Iterator[None]:
    """Let the attention of a layer return zeros inside the block, in the structure of its output."""
    module = getattr(layer, name)

    def zeros(module: Any, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    hook = module.register_forward_hook(zeros)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def written_tower(model: Any, inputs: Any, reducer: IPCV) -> Iterator[None]:
    """Run the vision tower of a model by the written-out rule inside the block."""
    adapter: Any = find_adapter(model)
    layouts = adapter.layouts(inputs)
    patches = [layout.tokens * adapter.pooling**2 for layout in layouts]
    tower = WrittenTower(adapter, patches if adapter.one_sequence else patches[:1], reducer, int(adapter.has_cls))
    originals = [layer.forward for layer in adapter.tower_layers]

    def run(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs: list[Any] = []

        def call(states: Tensor) -> Tensor:
            outputs.append(originals[index](states if hidden.dim() == 3 else states[0], *args, **kwargs))
            first = outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]
            return first if first.dim() == 3 else first[None]

        states = tower.run(index, adapter.tower_layers[index], call, hidden if hidden.dim() == 3 else hidden[None])
        states = states if hidden.dim() == 3 else states[0]
        return (states, *outputs[-1][1:]) if isinstance(outputs[-1], tuple) else states

    try:
        for index, layer in enumerate(adapter.tower_layers):
            layer.forward = lambda *args, index=index, **kwargs: run(
                index, *(args if args else (kwargs.pop("hidden_states"),)), **kwargs
            )
        yield
    finally:
        for layer in adapter.tower_layers:
            del layer.forward


def batch(family: Any) -> Any:
    return family.batch([(84, 84)], [(56, 112), (84, 56)])


@torch.no_grad()
def test_a_tower_equals_the_written_rule(family: Any) -> None:
    model, inputs, reducer = family.model(), batch(family), IPCV(**OPTIONS)
    with reducer(model) as run:
        actual = model(**inputs).logits
    assert all(selection.is_identity for selection in run.selections)
    with written_tower(model, inputs, reducer):
        expected = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (actual - expected)[real].abs().max() <= 1e-5
    assert (actual - model(**inputs).logits)[real].abs().max() > 1e-3
    for change in ({"neighbors": 2}, {"attended_layers": 2}, {"schedule": ((2, 0.35),)}):
        with IPCV(**{**OPTIONS, **change})(model):
            assert (model(**inputs).logits - expected)[real].abs().max() > 1e-4


@torch.no_grad()
def test_nothing_changes_at_all_patches_and_nothing_is_left(family: Any) -> None:
    model, inputs = family.model(), batch(family)
    expected, state = model(**inputs).logits, collect_state(model)
    with IPCV(1.0)(model):
        assert torch.equal(model(**inputs).logits, expected)
    with IPCV()(model):
        model(**inputs)
    assert collect_state(model) == state


@torch.no_grad()
def test_compositions_with_other_stages(family: Any) -> None:
    model, inputs = family.model(), batch(family)
    parts = [IPCV(**OPTIONS), HiRED(0.2), FastV(layer=1, budget=0.5)]
    if find_adapter(model).provides >= {"patch_removal"}:
        parts = [PixelPrune(budget=0.8), *parts]
    with Composed(parts)(model) as run:
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert all(selection.kept_tokens == selection.asked for selection in run.selections)
