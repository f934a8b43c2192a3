"""Operators, reads and copies of a reduced call on an emulated accelerator, and images that are reduced together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.emulated_device import DEVICE, EmulatedDevice, move_model, to_cpu, to_device
from tests.helpers.families import FAMILIES
from tokenprune.adapter import find_adapter
from tokenprune.batch import BatchSelector, group_images
from tokenprune.catalog import strategies
from tokenprune.checks import defer_checks, raise_first_failure, stack_failures
from tokenprune.component_reducer import ComponentReducer
from tokenprune.decoder_reducer import AtLayer
from tokenprune.encoder_reducer import PatchDropReducer
from tokenprune.geometry import RECENT_LAYOUTS, TileGeometry, share_layouts
from tokenprune.image import EncodedImage
from tokenprune.policies import AllocationPolicy
from tokenprune.reducer import ScoreReducer, TokenReducer
from tokenprune.run import DRAWABLE
from tokenprune.selection import MaskCount, Selection, count_rows, store_row_counts, true_indices
from tokenprune.strategies import HERO, IPCV, DivPrune, EViT, FasterVLM, HiRED, PruMerge, QuestionFirst, ToMe, VisionZip
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import MaxMinDiversitySelection
from tokenprune.strategies.components.relevance import AttentionRelevance
from tokenprune.strategies.question_first import QuestionFirstSelection
from tokenprune.testing.encoded_images import random_encoded_image
from tokenprune.testing.tiny_models import batch, tiny_model

CLASSES_WITHOUT_READS = [HiRED, FasterVLM, VisionZip, DivPrune]
without_text = QuestionFirstSelection(relevance=AttentionRelevance())
WITHOUT_READS = [*CLASSES_WITHOUT_READS, partial(QuestionFirst, selection=without_text)]
"""Strategies whose numbers of kept tokens follow from the budget."""
IN_TOWER = [ToMe(r=2), EViT(), IPCV(), EViT() >> HiRED(0.2, newlines="drop")]
"""Strategies inside the vision tower, of which each step that drops patches has a check."""
OPERATORS = {1: 150, 8: 220}
"""Operators beyond the plain model, for one image and for eight images of one layout."""
OPERATORS_OF_WEIGHTS = 25
"""Operators that QuestionFirst requires in addition, for the weights of its distances."""
WIDE = TileGeometry.anyres((40, 160), (1, 2), (4, 4), 56)


@cache
def load_model() -> Any:
    return move_model(tiny_model("llava_next"))


def run_plain(images: int) -> EmulatedDevice:
    """Return the counts of a call after the first one, which has more operators."""
    inputs = dict(batch("llava_next", *[[(112, 112)]] * images))
    with torch.no_grad(), EmulatedDevice():
        load_model()(**to_device(inputs))
        with EmulatedDevice() as device:
            load_model()(**to_device(inputs))
    return device


def run_reduced(reducer: TokenReducer, images: int) -> tuple[EmulatedDevice, Any]:
    """Return the counts of a call after the first ones, which copy tables and keep pixels for drawing, and the run."""
    inputs = dict(batch("llava_next", *[[(112, 112)]] * images))
    with torch.no_grad(), EmulatedDevice(), reducer(load_model()) as run:
        for _ in range(1 + DRAWABLE // images):
            load_model()(**to_device(inputs))
        with EmulatedDevice() as device:
            load_model()(**to_device(inputs))
    return device, run


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("strategy", WITHOUT_READS)
@pytest.mark.parametrize("newlines", ["keep_rows", "drop", "keep"])
def test_operators_and_reads_beyond_the_plain_model(strategy: Any, images: int, newlines: Any) -> None:
    plain, (reduced, _) = run_plain(images), run_reduced(strategy(0.2, newlines=newlines), images)
    limit = OPERATORS[images] + (OPERATORS_OF_WEIGHTS if isinstance(strategy, partial) else 0)
    assert sum(reduced.operators.values()) - sum(plain.operators.values()) <= limit
    assert sum(reduced.reads.values()) - sum(plain.reads.values()) <= (newlines == "keep_rows")
    assert sum(reduced.copies.values()) <= sum(plain.copies.values())


@pytest.mark.parametrize(
    "reducer",
    [pytest.param(r, marks=pytest.mark.slow if r.label in ("ToMe", "IPCV") else (), id=r.label) for r in IN_TOWER],
)
def test_reads_of_strategies_inside_the_tower(reducer: TokenReducer) -> None:
    """The checks of all steps are read with the numbers of newline tokens, or at the end of the block.

    A later strategy before the LLM selects in layouts of the tokens that remain, which are read once for all images.
    """
    *earlier, last = reducer.list_parts()
    reads = [sum(run_reduced(reducer, images)[0].reads.values()) for images in (1, 8)]
    expected = [sum(run_reduced(HiRED(0.2, newlines=last.newlines), n)[0].reads.values()) for n in (1, 8)]
    assert reads == [number + len(earlier) for number in expected]


@pytest.mark.parametrize("strategy", WITHOUT_READS)
def test_reads_do_not_grow_with_the_images(strategy: Any) -> None:
    counts = [sum(run_reduced(strategy(0.2), images)[0].reads.values()) for images in (2, 8)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("strategy", WITHOUT_READS)
def test_the_emulated_device_keeps_the_tokens_of_the_cpu(strategy: Any) -> None:
    _, run = run_reduced(strategy(0.2), 2)
    model, inputs = tiny_model("llava_next"), batch("llava_next", *[[(112, 112)]] * 2)
    with torch.no_grad(), strategy(0.2)(model) as expected:
        model(**inputs)
    with EmulatedDevice():
        for selection, reference in zip(run.selections[:2], expected.selections, strict=True):
            assert torch.equal(to_cpu(selection.kept), reference.kept)
            assert selection.kept_per_tile == reference.kept_per_tile
            assert (selection.kept_tokens, selection.kept_newlines) == (
                reference.kept_tokens,
                reference.kept_newlines,
            )


@pytest.mark.parametrize(
    "name", sorted(name for name, kind in strategies().items() if kind.stage.name in ("image", "projector"))
)
def test_images_reduced_together_keep_the_tokens_of_each_image(name: str) -> None:
    reducer = strategies()[name](0.3)
    images = [random_encoded_image(WIDE, seed) for seed in range(3)]
    images += [random_encoded_image(TileGeometry.single((4, 4)), seed) for seed in range(2)]
    together = BatchSelector(reducer).select([*images, images[0]]).selections
    assert together[0] is together[-1]
    for image, selection in zip(images, together[:-1], strict=True):
        alone = reducer.reduce(image)
        assert torch.equal(selection.kept, alone.kept)
        assert selection.kept_tokens == alone.kept_tokens == int(alone.kept.sum())
        assert selection.kept_newlines == alone.kept_newlines
        assert selection.kept_per_tile == alone.kept_per_tile
        assert selection.granted_per_tile == alone.granted_per_tile
        for part in ("mixing", "order", "newline_mask"):
            value, expected = getattr(selection, part), getattr(alone, part)
            assert (value is None) == (expected is None)
            assert value is None or torch.allclose(value.float(), expected.float(), atol=1e-6)


@pytest.mark.parametrize(
    "name", sorted(name for name, kind in strategies().items() if kind.stage.name in ("image", "projector"))
)
def test_reads_of_all_strategies(name: str) -> None:
    """Only EADP (the budget of each tile, for each image) and SpatialPooling (once for a layout) read values."""
    make = strategies()[name]
    images = [random_encoded_image(WIDE, seed) for seed in range(3)]
    on_device = [
        replace(
            image, signals=to_device(image.signals), features=to_device(image.features), device=torch.device(DEVICE)
        )
        for image in images
    ]
    selector = BatchSelector(make(0.3))
    for number in (1, 3):
        with EmulatedDevice():
            selector.select(on_device[:number])  # copies index tables to the device
        with EmulatedDevice() as device:
            selections = selector.select(on_device[:number]).selections
        assert sum(device.reads.values()) == {"EADP": number, "SpatialPooling": 2}.get(name, 0)
    for image, selection in zip(images, selections, strict=True):
        assert torch.equal(to_cpu(selection.kept), make(0.3).reduce(image).kept)


def test_stored_row_counts_are_void_after_a_modification() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            counted = store_row_counts(mask, [7, 8])
            assert count_rows(counted) == [7, 8]
            counted[1, 0] = True
            assert count_rows(counted) == [2, 2]
    assert count_rows(mask) == [2, 1]


def test_a_budget_of_nan_is_an_error() -> None:
    image = random_encoded_image(WIDE, 1)
    signals = {key: value * torch.nan if key[0] == "cls_features" else value for key, value in image.signals.items()}
    for reducer in (HERO(0.3), HERO.release(0.3), HERO(0, padding="ignore")):
        with pytest.raises(ValueError, match=r"SaliencyRelevanceAllocation\.allocate returned a negative number"):
            reducer.reduce(image.with_signals(signals))


def test_a_selection_can_change_candidates_in_place() -> None:
    @dataclass
    class ChangesCandidates(MaxMinDiversitySelection):
        def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
            candidates[:, ::2] = False
            return super().pick(image, scores, budgets, candidates)

    image = random_encoded_image(WIDE)
    valid = image.geometry.valid.clone()
    ComponentReducer(3, allocation=UniformAllocation(), selection=ChangesCandidates()).reduce(image)
    assert torch.equal(image.geometry.valid, valid)


@pytest.mark.parametrize("strategy", [*CLASSES_WITHOUT_READS, QuestionFirst])
def test_strategies_without_reads_run_once_for_a_group(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    select = strategy.select
    monkeypatch.setattr(strategy, "select", lambda self, image: calls.append(image) or select(self, image))
    selector = BatchSelector(strategy(0.3))
    selector.select([random_encoded_image(WIDE, seed) for seed in range(4)])
    calls.clear()
    selector.select([random_encoded_image(WIDE, seed) for seed in range(4)])
    assert len(calls) == 1


@dataclass
class ReadsValues(ScoreReducer):
    """A strategy for one image that reads values, so that images cannot be reduced together."""

    def score(self, image: EncodedImage) -> Tensor:
        norms = image.features.norm(dim=-1)
        return norms / float(norms.max())


@dataclass
class NaNScores(ScoreReducer):
    def score(self, image: EncodedImage) -> Tensor:
        return image.features.norm(dim=-1) * torch.nan


@dataclass
class NaNPatches(PatchDropReducer):
    def score(self, image: EncodedImage) -> Tensor:
        return image.features.norm(dim=-1) * torch.nan


@dataclass
class KeepsPadding(TokenReducer):
    """A strategy with its own `select`, which keeps all tokens, also those that are not valid."""

    def select(self, image: EncodedImage) -> Selection:
        kept = torch.ones(image.geometry.tiles, image.geometry.tokens, dtype=torch.bool, device=image.device)
        return Selection(image.geometry, kept, asked=kept.numel())


def test_a_strategy_that_reads_values_is_applied_to_each_image() -> None:
    images = [random_encoded_image(WIDE, seed) for seed in range(3)]
    reducer = ReadsValues(7)
    together = BatchSelector(reducer).select(images).selections
    for image, selection in zip(images, together, strict=True):
        assert torch.equal(selection.kept, reducer.reduce(image).kept)


@dataclass
class EditsInPlace(HiRED):
    """A strategy that changes the mask of its base class in place."""

    def select(self, image: EncodedImage) -> Selection:
        selection = super().select(image)
        selection.kept[:, :3] = False
        return selection


@dataclass
class EditsScoresInPlace(ScoreReducer):
    def score(self, image: EncodedImage) -> Tensor:
        return image.features.norm(dim=-1)

    def select(self, image: EncodedImage) -> Selection:
        selection = super().select(image)
        selection.kept[:, :3] = False
        return selection


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("strategy", [EditsInPlace, EditsScoresInPlace])
@pytest.mark.parametrize("images", [1, 2])
def test_a_mask_can_be_changed_in_place(strategy: Any, mode: Any, images: int) -> None:
    model, inputs = tiny_model("llava_next"), batch("llava_next", *[[(112, 112)]] * images)
    with mode(), strategy(0.3)(model) as run:
        model(**inputs)
    for selection in run.selections:
        assert selection.kept_tokens == int(selection.kept.sum()) != selection.asked


@dataclass
class RandomScores(ScoreReducer):
    """A strategy that draws random numbers for each image."""

    def score(self, image: EncodedImage) -> Tensor:
        return torch.rand(image.geometry.tiles, image.geometry.tokens)


@dataclass
class RandomFeatureScores(ScoreReducer):
    def score(self, image: EncodedImage) -> Tensor:
        return torch.rand_like(image.features[..., 0])


@pytest.mark.parametrize("strategy", [RandomScores, RandomFeatureScores])
def test_each_image_draws_its_own_random_numbers(strategy: Any) -> None:
    images, reducer = [random_encoded_image(WIDE, seed) for seed in range(3)], strategy(0.3)
    torch.manual_seed(0)
    together = BatchSelector(reducer).select(images).selections
    torch.manual_seed(0)
    for image, selection in zip(images, together, strict=True):
        assert torch.equal(selection.kept, reducer.reduce(image).kept)


@dataclass
class AsksForTensors(TokenReducer):
    """A strategy whose number of asked tokens is a tensor."""

    def select(self, image: EncodedImage) -> Selection:
        norms = image.features.norm(dim=-1)
        kept = (norms > norms.mean()) & image.geometry.valid
        return Selection(image.geometry, kept, asked=kept.sum())  # type: ignore[arg-type]


def test_numbers_of_a_selection_are_numbers_of_its_image() -> None:
    images, reducer = [random_encoded_image(WIDE, seed) for seed in range(3)], AsksForTensors()
    for selection in BatchSelector(reducer).select(images).selections:
        assert int(selection.asked) == selection.kept_tokens


@dataclass
class SpendsOneLess(MaxMinDiversitySelection):
    """A selection that changes the budgets in place."""

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        budgets -= 1
        return super().pick(image, scores, budgets, candidates)

    @property
    def is_exact(self) -> bool:
        return False


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_budgets_that_a_selection_changes_hold_for_one_image(mode: Any) -> None:
    image = random_encoded_image(WIDE)
    with mode():
        reducer = ComponentReducer(18, allocation=UniformAllocation(), selection=SpendsOneLess())
        selections = [reducer.reduce(image) for _ in range(2)]
    assert [selection.kept_tokens for selection in selections] == [15, 15]
    assert [selection.granted_per_tile for selection in selections] == [[6, 6, 6]] * 2


@dataclass
class FractionalAllocation(AllocationPolicy):
    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> Any:
        return [2.5] * len(capacity)


def test_an_allocation_can_return_fractions() -> None:
    reducer = ComponentReducer(9, allocation=FractionalAllocation(), selection=MaxMinDiversitySelection())
    assert reducer.reduce(random_encoded_image(WIDE)).granted_per_tile == [2.5, 2.5, 2.5]


@pytest.mark.parametrize("strategy", [PruMerge, VisionZip])
@pytest.mark.parametrize("newlines", ["keep", "drop"])
def test_merging_strategies_can_keep_no_token(strategy: Any, newlines: Any) -> None:
    model, inputs = tiny_model("llava_next"), batch("llava_next", [(112, 112)], [(112, 112), (56, 112)])
    with torch.no_grad(), strategy(0, newlines=newlines)(model) as run:
        logits = model(**inputs).logits
    with torch.no_grad(), FasterVLM(0, newlines=newlines)(model):
        assert torch.equal(logits, model(**inputs).logits)
    assert [selection.kept_tokens for selection in run.selections] == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("reducer", "message"), [(NaNScores(5), "returned NaN"), (KeepsPadding(5), "own unpadding removes")]
)
def test_checks_are_deferred_and_raise_when_they_are_read(reducer: Any, message: str, count: int) -> None:
    images = [random_encoded_image(WIDE, seed) for seed in range(count)]
    with pytest.raises(ValueError, match=message):
        reducer.reduce(images[0])
    checks = BatchSelector(reducer).select(images).checks
    with pytest.raises(ValueError, match=message):
        raise_first_failure(checks, stack_failures(checks, torch.device("cpu")).tolist())


def test_a_failed_check_on_an_accelerator_raises_at_the_end_of_the_block() -> None:
    inputs = to_device(dict(batch("llava_next", [(112, 112)])))
    with torch.no_grad(), EmulatedDevice():
        with pytest.raises(ValueError, match="returned NaN"), NaNScores(5, newlines="drop")(load_model()):
            load_model()(**inputs)
        # With kept rows, newline tokens are counted, so the call itself reads the checks.
        with NaNScores(5)(load_model()), pytest.raises(ValueError, match="returned NaN"):
            load_model()(**inputs)
        with pytest.raises(ValueError, match="returned NaN"), NaNPatches(newlines="drop")(load_model()):
            load_model()(**inputs)
        handle = NaNScores(5, newlines="drop").attach(load_model())
        load_model()(**inputs)
        with pytest.raises(ValueError, match="returned NaN"):
            handle.detach()
        load_model()(**inputs)  # the model is as before


def test_a_failed_check_at_a_cut_raises_at_the_end_of_the_block() -> None:
    inputs = to_device(dict(batch("llava_next", [(112, 112)])))
    reducer = AtLayer(1, NaNScores(5, newlines="drop"))
    with torch.no_grad(), EmulatedDevice(), pytest.raises(ValueError, match="returned NaN"), reducer(load_model()):
        load_model()(**inputs)


def test_checks_of_an_inner_block_are_not_lost() -> None:
    with defer_checks() as outer:
        checks = BatchSelector(NaNScores(5)).select([random_encoded_image(WIDE)]).checks
    assert checks
    assert not outer


def test_a_count_holds_for_its_mask_only() -> None:
    kept = torch.tensor([[True, False, True, True]])
    selection = Selection(TileGeometry.single((2, 2)), kept, asked=3, counts=(MaskCount.of(kept, 3),))
    assert selection.token_count == selection.kept_tokens == 3
    other = replace(selection, kept=torch.tensor([[True, False, False, False]]))
    assert (other.token_count, other.kept_tokens) == (None, 1)
    kept[0, 0] = False
    assert (selection.token_count, selection.kept_tokens) == (None, 2)


def test_groups_have_one_layout_and_one_shape_of_signals() -> None:
    images = [random_encoded_image(WIDE), random_encoded_image(WIDE, dim=7), random_encoded_image(WIDE, seed=1)]
    images.append(random_encoded_image(replace(WIDE)))
    assert [len(group) for group in group_images(images)] == [2, 1, 1]


READING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "item": lambda values, index: values[0].item(),
    "bool": lambda values, index: bool(values[0] > 0),
    "in": lambda values, index: 1 in index,
    "index": lambda values, index: [0, 1, 2][index[0]],
    "slice": lambda values, index: values[: index[0]],
    "arange": lambda values, index: torch.arange(index[0], device=values.device),
    "mask": lambda values, index: values[values > 0],
    "where": lambda values, index: torch.where(values > 0),
    "allclose": lambda values, index: torch.allclose(values, values),
    "repeat_interleave": lambda values, index: values.repeat_interleave(index),
    "split": lambda values, index: values.split(index.tolist()),
    "unique": lambda values, index: values.unique(),
    "unique rows": lambda values, index: values[:, None].unique(dim=0),
    "bincount": lambda values, index: index.bincount(),
    "one_hot": lambda values, index: torch.nn.functional.one_hot(index),
    "to_sparse": lambda values, index: values.to_sparse(),
    "inverse": lambda values, index: torch.linalg.inv(values.outer(values) + values.diag()),
}
WITHOUT_READING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "iteration": lambda values, index: [2 * value for value in values],
    "repeat_interleave": lambda values, index: values.repeat_interleave(index, output_size=3),
    "one_hot": lambda values, index: torch.nn.functional.one_hot(index, 3),
    "masked_scatter": lambda values, index: values.masked_scatter(values > 1, values),
    "gather": lambda values, index: values[index],
}


@pytest.mark.parametrize(
    ("operation", "is_read"),
    [
        *(pytest.param(operation, True, id=name) for name, operation in READING.items()),
        *(pytest.param(operation, False, id=f"{name}, no read") for name, operation in WITHOUT_READING.items()),
    ],
)
def test_the_emulated_device_counts_reads(operation: Any, is_read: bool) -> None:
    values, index = to_device([torch.tensor([1.0, 2.0, 1.5]), torch.tensor([0, 1, 2])])
    with EmulatedDevice() as device:
        operation(values, index)
    assert bool(device.reads) == is_read


def test_copies_of_a_layout() -> None:
    with EmulatedDevice() as device:
        moved = WIDE.to("emulated:0")
        assert moved is WIDE.to(torch.device("emulated:0")) is moved.to("emulated:0")
        assert moved.original is WIDE is moved.to("cpu")
        for table in ("valid", "token_order", "pack_index", "token_newline", "ends_row"):
            assert torch.equal(to_cpu(getattr(moved, table)), getattr(WIDE, table))
        assert moved.valid_per_tile == WIDE.valid_per_tile
        changed = replace(moved, packed=moved.packed[:-1])
        assert changed.original is changed  # another layout: the tables of the original do not apply
    assert not device.reads


def test_equal_layouts_of_several_calls_are_one_object() -> None:
    with torch.inference_mode():
        first, second = share_layouts([TileGeometry.single((3, 5)), TileGeometry.anyres((40, 160), (1, 2), (4, 4), 56)])
    assert not first.packed.is_inference()
    assert share_layouts([replace(WIDE), TileGeometry.single((3, 5))]) == [second, first]
    others = share_layouts([TileGeometry.single((5, 3)), replace(WIDE, packed=WIDE.packed.flip(0))])
    assert not {first, second} & set(others)


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl", "phi4_multimodal", "llava_onevision"])
def test_images_of_one_layout_are_one_group_in_each_family(family: str) -> None:
    example = FAMILIES[family]
    inputs, adapter = dict(example.batch(*[[example.sizes[0]]] * 3)), find_adapter(example.model())
    for _ in range(2):
        with torch.no_grad():
            images = adapter.encode(inputs, ()).images
        assert [len(group) for group in group_images(images)] == [3]


def test_a_model_stores_few_layouts() -> None:
    adapter = find_adapter(tiny_model("llava_next"))
    for height in range(40, 40 + 2 * RECENT_LAYOUTS):
        pixels, sizes = torch.zeros(1, 5, 3, 56, 56), torch.tensor([[height, 50]])
        (layout,) = adapter.layouts({"pixel_values": pixels, "image_sizes": sizes})
        assert adapter.layouts({"pixel_values": pixels, "image_sizes": sizes}) == [layout]
    assert len(adapter._layouts_by_size) == RECENT_LAYOUTS  # type: ignore[attr-defined]


def test_true_indices() -> None:
    mask = torch.tensor([False, True, True, False, True])
    assert true_indices(mask, 3).tolist() == [1, 2, 4]
    assert true_indices(mask, 0).tolist() == []


@pytest.mark.parametrize("strategy", WITHOUT_READS)
def test_generate_reads_as_often_as_a_plain_call(strategy: Any) -> None:
    inputs, options = dict(batch("llava_next", *[[(112, 112)]] * 2)), {"max_new_tokens": 2, "do_sample": False}

    def count_reads() -> int:
        with EmulatedDevice() as device:
            load_model().generate(**to_device(inputs), **options)
        return sum(device.reads.values())

    with torch.no_grad(), EmulatedDevice():
        plain = count_reads()
        with strategy(0.2)(load_model()):
            for _ in range(1 + DRAWABLE // 2):  # the first images keep pixels for drawing
                reduced = count_reads()
    assert reduced <= plain + 1
