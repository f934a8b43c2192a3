"""Test merging and output order: single components, and the features that enter a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.adapter import find_adapter
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.image import EncodedImage, Signal
from tokenprune.pipeline import Pipeline
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run
from tokenprune.selection import Selection
from tokenprune.stages import mix
from tokenprune.strategies import TRIM, HiRED, PruMerge, SpatialPooling, VisionZip
from tokenprune.strategies.components import (
    GlobalTopAllocation,
    MeanOfRestMerging,
    PooledGridMerging,
    ScoreOrder,
    UniformAllocation,
)
from tokenprune.strategies.components.merging import divide_into_cells
from tokenprune.strategies.components.selection import sample_mask
from tokenprune.testing.encoded_images import random_encoded_image
from tokenprune.testing.tiny_models import batch, tiny_model

WIDE_LAYOUT = TileGeometry.anyres((60, 160), (1, 3), (4, 4), 56)  # with padding


def list_kept_in_packed_order(selection: Selection) -> torch.Tensor:
    """Return the flat index of each kept token in packed order."""
    packed = selection.geometry.packed
    token_indices = packed[packed != NEWLINE]
    return token_indices[selection.kept.flatten()[token_indices]]


def test_mean_of_rest_averages_the_dropped_tokens_of_a_tile() -> None:
    image = random_encoded_image(WIDE_LAYOUT)
    selection = HiRED(20, allocation=UniformAllocation(), merging=MeanOfRestMerging()).reduce(image)
    assert selection.kept_tokens == 20
    weights = selection.mixing.to_dense()  # type: ignore[union-attr]
    merged = [row for row in range(20) if (weights[row] > 0).sum() > 1]
    assert len(merged) == image.geometry.tiles
    for row in merged:
        index = list_kept_in_packed_order(selection)[row]
        tile = int(index) // image.geometry.tokens
        is_source = (image.geometry.valid & ~selection.kept)[tile]
        is_source[index % image.geometry.tokens] = True
        start = tile * image.geometry.tokens
        assert torch.equal((weights[row] > 0)[start : start + image.geometry.tokens], is_source)
        scores = selection.scores[tile]  # type: ignore[index]
        assert float(scores[index % image.geometry.tokens]) == float(
            scores[is_source].max()
        )  # its position is the best-scored source


def test_visionzip_uses_every_token_exactly_once() -> None:
    image = random_encoded_image(WIDE_LAYOUT)
    selection = VisionZip(20).reduce(image)
    weights = selection.mixing.to_dense()  # type: ignore[union-attr]
    assert torch.equal((weights > 0).sum(dim=0) > 0, image.geometry.valid.flatten())
    assert int((weights > 0).sum()) == int(image.geometry.valid.sum())
    assert torch.allclose(weights.sum(dim=1), torch.ones(20))


def test_neighbors_are_weighted_by_their_attention() -> None:
    layout = TileGeometry.single((1, 4))
    signals = {
        ("joint_attention", 3): torch.tensor([[[0.4, 0.1, 0.3, 0.2]]]),
        ("keys", 3): torch.tensor([[[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]]]),
        ("projector_inputs", 2): torch.eye(4)[None],
    }
    image = EncodedImage(layout, torch.zeros(1, 4, 1), signals, layers=4, feature_layer=2)
    merging = replace(PruMerge().merging, neighbors=1)
    weights = PruMerge(3, merging=merging).reduce(image).mixing.to_dense()  # type: ignore[union-attr]
    # Tokens 0 and 2 are kept and merge their nearest neighbor; the mean of 1 and 3 is at the position of 3.
    assert torch.allclose(weights[0], torch.tensor([1.0, 0.1, 0, 0]) / 1.1)
    assert torch.allclose(weights[1], torch.tensor([0, 0, 1.0, 0.2]) / 1.2)
    assert torch.allclose(weights[2], torch.tensor([0, 0.1, 0, 0.2]) / 0.3)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_any_number_of_cells_tiles_the_rectangle(rows: int, cols: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, rows * cols))
    cells = divide_into_cells(number, rows, cols)
    assert len(cells) == number
    area = (cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])
    assert float(area.sum()) == pytest.approx(1)
    assert bool(((cells[:, 3] - cells[:, 1]) * cols >= 1 - 1e-9).all())
    assert bool(((cells[:, 2] - cells[:, 0]) * rows >= 1 - 1e-9).all())


def test_pooling_averages_the_tokens_of_a_cell() -> None:
    layout = TileGeometry.single((4, 4))
    image = EncodedImage(layout, torch.arange(16.0).view(1, 16, 1))
    selection = SpatialPooling(4).reduce(image)
    assert selection.kept[0].nonzero()[:, 0].tolist() == [5, 7, 13, 15]
    pooled = selection.mixing @ image.features[0]  # type: ignore[operator]
    assert pooled[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("number", [1, 2, 3, 5, 7, 11, 13, 16])
def test_pooling_accepts_any_budget(number: int) -> None:
    assert (
        HiRED(number, allocation=UniformAllocation(), merging=PooledGridMerging())
        .reduce(random_encoded_image(WIDE_LAYOUT))
        .kept_tokens
        == number
    )


def test_samples_are_evenly_spaced() -> None:
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 3:8] = False
    samples = sample_mask(mask, torch.tensor([[2], [5]]))
    assert [row.nonzero()[:, 0].tolist() for row in samples] == [[2, 7], [0, 1, 2, 8, 9]]
    assert not sample_mask(mask, torch.tensor([[0], [0]])).any()
    assert sample_mask(mask, torch.tensor([[3], [2]]), "step")[0].nonzero()[:, 0].tolist() == [0, 3, 6]


def test_order_by_score() -> None:
    layout = TileGeometry.single((2, 2))
    signals = {("cls_attention", 2): torch.tensor([[[0.1, 0.3, 0.2, 0.0]]])}
    image = EncodedImage(layout, torch.zeros(1, 4, 1), signals, layers=4, feature_layer=2)
    selection = HiRED(3, order=ScoreOrder()).reduce(image)
    assert list_kept_in_packed_order(selection)[selection.order].tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="use positions='reindex'"):
        HiRED(3, order=ScoreOrder(), positions="preserve")


def test_merging_works_in_one_pool() -> None:
    image = random_encoded_image(WIDE_LAYOUT)
    selection = HiRED(20, allocation=GlobalTopAllocation(), merging=MeanOfRestMerging()).reduce(image)
    weights = selection.mixing.to_dense()  # type: ignore[union-attr]
    assert weights.shape == (20, 64)
    (merged,) = [row for row in range(20) if (weights[row] > 0).sum() > 1]
    assert int((weights[merged] > 0).sum()) == int(image.geometry.valid.sum()) - 19


def test_no_token_is_merged_at_a_full_budget() -> None:
    for strategy in (VisionZip, PruMerge, SpatialPooling):
        assert strategy(1.0).reduce(random_encoded_image(WIDE_LAYOUT)).is_identity


# --- features of the model --------------------------------------------------------------------------------------------


@dataclass
class EverySecondTokenReducer(TokenReducer):
    """Keeps every second token if it is valid, with the mixing and order of its options."""

    mixing: str = "none"
    is_reversed: bool = False

    @property
    def needs(self) -> list[Signal]:
        return [Signal("projector_inputs"), Signal("cls_features")]

    def select(self, image: EncodedImage) -> Selection:
        kept = image.geometry.valid.clone()
        kept.view(-1)[::2] = False
        selection = Selection(image.geometry, kept, int(kept.sum()))
        indices = list_kept_in_packed_order(selection)
        total = image.geometry.tiles * image.geometry.tokens
        one_hot = torch.zeros(len(indices), total).scatter(1, indices[:, None], 1.0)
        if self.mixing != "none":
            noise = torch.rand(one_hot.shape, generator=torch.Generator().manual_seed(3))
            selection = replace(selection, mixing=one_hot if "one-hot" in self.mixing else noise)
            selection = replace(selection, before_projector="before" in self.mixing)
        order = torch.arange(len(indices)).flip(0) if self.is_reversed else None
        return replace(selection, order=order)


def run_pipeline(family: str, reducer: TokenReducer) -> tuple[Run, list[torch.Tensor], list[EncodedImage]]:
    """Return the run, the features of each image that enter the model, and the encoded images."""
    model = tiny_model(family)
    pipeline = Pipeline(reducer, find_adapter(model))
    inputs = dict(batch(family, [(112, 112)], [(60, 160)]))
    with torch.no_grad():
        encoding = pipeline.encode(inputs)
        prepared = pipeline.prepare(inputs, encoding=encoding).inputs
    return pipeline.run, prepared["mm_encoder_outputs"]["image"].pooler_output, encoding.images


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("mixing", ["one-hot before", "one-hot"])
def test_one_hot_mixing_is_dropping(family: str, mixing: str) -> None:
    _, expected, _ = run_pipeline(family, EverySecondTokenReducer())
    _, mixed, _ = run_pipeline(family, EverySecondTokenReducer(mixing=mixing))
    for expected_features, mixed_features in zip(expected, mixed, strict=True):
        assert torch.allclose(expected_features, mixed_features, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_mixing_before_the_projector_is_projected(family: str) -> None:
    run, features_by_image, images = run_pipeline(family, EverySecondTokenReducer(mixing="noise before"))
    projector = tiny_model(family).base_model.multi_modal_projector
    for selection, features, image in zip(run.selections, features_by_image, images, strict=True):
        sources = image.projector_inputs().flatten(0, 1)
        with torch.no_grad():
            expected = projector(selection.mixing @ sources)
        tokens = features[image.geometry.packed[selection.packed_mask()] != NEWLINE]
        assert torch.allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_an_order_moves_tokens_but_not_newlines(family: str) -> None:
    run, features, images = run_pipeline(family, EverySecondTokenReducer())
    _, reversed_features, _ = run_pipeline(family, EverySecondTokenReducer(is_reversed=True))
    for selection, original, reordered, image in zip(run.selections, features, reversed_features, images, strict=True):
        is_token = image.geometry.packed[selection.packed_mask()] != NEWLINE
        assert torch.equal(original[~is_token], reordered[~is_token])
        assert torch.equal(original[is_token].flip(0), reordered[is_token])


def test_invalid_mixing_matrices_and_orders_raise() -> None:
    @dataclass
    class InvalidReducer(EverySecondTokenReducer):
        def select(self, image: EncodedImage) -> Selection:
            selection = super().select(image)
            mixing = torch.zeros(3, 3) if self.mixing == "none" else None
            return replace(selection, mixing=mixing, order=torch.zeros(selection.kept_tokens, dtype=torch.long))

    image = random_encoded_image(WIDE_LAYOUT)
    with pytest.raises(ValueError, match=r"mixing matrix of torch.float32 \[3, 3\]; it must be \[kept, 64\]"):
        InvalidReducer().reduce(image)
    with pytest.raises(ValueError, match="an order that is no permutation"):
        InvalidReducer(mixing="x").reduce(image)


def test_merging_at_half_precision_sums_in_float32() -> None:
    weights = torch.full((1, 4096), 1 / 4096)
    sources = torch.full((4096, 2), 3.0, dtype=torch.bfloat16)
    assert mix(weights, sources).tolist() == [[3.0, 3.0]]


def test_trim_requires_a_text_model() -> None:
    with pytest.raises(ValueError, match=r"TRIM reads the question.*set text_model"), TRIM()(tiny_model("llava")):
        pass
