"""Merging and output order: pure pieces, and what really enters a live model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.adapter import find_adapter
from tokenprune.image import NEWLINE, EncodedImage, Signal, TileGeometry
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
from tokenprune.strategies.components.merging import divide_into_cells, evenly_spaced_indices
from tokenprune.testing.encoded_images import random_encoded_image
from tokenprune.testing.tiny_models import batch, tiny_model

WIDE = TileGeometry.anyres((60, 160), (1, 3), (4, 4), 56)  # with padding


def places_in_prompt(selection: Selection) -> torch.Tensor:
    """Flat index of each kept token in packed order."""
    packed = selection.geometry.packed
    own = packed[packed != NEWLINE]
    return own[selection.kept.flatten()[own]]


def test_the_mean_of_the_rest_is_the_mean_of_the_rest() -> None:
    image = random_encoded_image(WIDE)
    selection = HiRED(20, allocation=UniformAllocation(), merging=MeanOfRestMerging()).reduce(image)
    assert selection.kept_tokens == 20
    weights = selection.mixing.to_dense()  # type: ignore[union-attr]
    merged = [row for row in range(20) if (weights[row] > 0).sum() > 1]
    assert len(merged) == image.geometry.tiles
    for row in merged:
        place = places_in_prompt(selection)[row]
        tile = int(place) // image.geometry.tokens
        lost = (image.geometry.valid & ~selection.kept)[tile]
        lost[place % image.geometry.tokens] = True
        start = tile * image.geometry.tokens
        assert torch.equal((weights[row] > 0)[start : start + image.geometry.tokens], lost)
        scores = selection.scores[tile]  # type: ignore[index]
        assert float(scores[place % image.geometry.tokens]) == float(
            scores[lost].max()
        )  # it stands for the best of them


def test_every_token_of_visionzip_enters_somewhere_exactly_once() -> None:
    image = random_encoded_image(WIDE)
    selection = VisionZip(20).reduce(image)
    weights = selection.mixing.to_dense()  # type: ignore[union-attr]
    assert torch.equal((weights > 0).sum(dim=0) > 0, image.geometry.valid.flatten())
    assert int((weights > 0).sum()) == int(image.geometry.valid.sum())
    assert torch.allclose(weights.sum(dim=1), torch.ones(20))


def test_a_neighbor_takes_part_by_its_attention() -> None:
    layout = TileGeometry.single((1, 4))
    signals = {
        ("joint_attention", 3): torch.tensor([[[0.4, 0.1, 0.3, 0.2]]]),
        ("keys", 3): torch.tensor([[[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]]]),
        ("projector_inputs", 2): torch.eye(4)[None],
    }
    image = EncodedImage(layout, torch.zeros(1, 4, 1), signals, layers=4, feature_layer=2)
    merging = replace(PruMerge().merging, neighbors=1)
    weights = PruMerge(3, merging=merging).reduce(image).mixing.to_dense()  # type: ignore[union-attr]
    # Tokens 0 and 2 stay; each takes up its likest neighbor; 1 and 3 are the rest, in the place of 3.
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


def test_pooling_averages_what_it_covers() -> None:
    layout = TileGeometry.single((4, 4))
    image = EncodedImage(layout, torch.arange(16.0).view(1, 16, 1))
    selection = SpatialPooling(4).reduce(image)
    assert selection.kept[0].nonzero()[:, 0].tolist() == [5, 7, 13, 15]
    pooled = selection.mixing @ image.features[0]  # type: ignore[operator]
    assert pooled[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("number", [1, 2, 3, 5, 7, 11, 13, 16])
def test_pooling_takes_any_number(number: int) -> None:
    assert (
        HiRED(number, allocation=UniformAllocation(), merging=PooledGridMerging())
        .reduce(random_encoded_image(WIDE))
        .kept_tokens
        == number
    )


def test_evenly_spaced() -> None:
    assert evenly_spaced_indices(10, 2).tolist() == [2, 7]
    assert evenly_spaced_indices(3, 0).tolist() == []


def test_order_by_score() -> None:
    layout = TileGeometry.single((2, 2))
    signals = {("cls_attention", 2): torch.tensor([[[0.1, 0.3, 0.2, 0.0]]])}
    image = EncodedImage(layout, torch.zeros(1, 4, 1), signals, layers=4, feature_layer=2)
    selection = HiRED(3, order=ScoreOrder()).reduce(image)
    assert places_in_prompt(selection)[selection.order].tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="use positions='reindex'"):
        HiRED(3, order=ScoreOrder(), positions="preserve")


def test_merging_works_in_one_pool() -> None:
    image = random_encoded_image(WIDE)
    selection = HiRED(20, allocation=GlobalTopAllocation(), merging=MeanOfRestMerging()).reduce(image)
    weights = selection.mixing.to_dense()  # type: ignore[union-attr]
    assert weights.shape == (20, 64)
    (merged,) = [row for row in range(20) if (weights[row] > 0).sum() > 1]
    assert int((weights[merged] > 0).sum()) == int(image.geometry.valid.sum()) - 19


def test_nothing_is_merged_where_nothing_is_dropped() -> None:
    for kind in (VisionZip, PruMerge, SpatialPooling):
        assert kind(1.0).reduce(random_encoded_image(WIDE)).everything


# --- what enters the model --------------------------------------------------------------------------------------------


@dataclass
class Answers(TokenReducer):
    """Keeps every second valid token, mixed or ordered as it is told to."""

    mixing: str = "none"
    backwards: bool = False

    @property
    def needs(self) -> list[Signal]:
        return [Signal("projector_inputs"), Signal("cls_features")]

    def select(self, image: EncodedImage) -> Selection:
        kept = image.geometry.valid.clone()
        kept.view(-1)[::2] = False
        chosen = Selection(image.geometry, kept, int(kept.sum()))
        places = places_in_prompt(chosen)
        total = image.geometry.tiles * image.geometry.tokens
        one_hot = torch.zeros(len(places), total).scatter(1, places[:, None], 1.0)
        if self.mixing != "none":
            noise = torch.rand(one_hot.shape, generator=torch.Generator().manual_seed(3))
            chosen = replace(chosen, mixing=one_hot if "one-hot" in self.mixing else noise)
            chosen = replace(chosen, before_projector="before" in self.mixing)
        order = torch.arange(len(places)).flip(0) if self.backwards else None
        return replace(chosen, order=order)


def handed_over(family: str, reducer: TokenReducer) -> tuple[Run, list[torch.Tensor], list[EncodedImage]]:
    """The run, the features that the model is given, and what the strategy saw."""
    model = tiny_model(family)
    pipeline = Pipeline(reducer, find_adapter(model))
    inputs = dict(batch(family, [(112, 112)], [(60, 160)]))
    with torch.no_grad():
        encoding = pipeline.encode(inputs)
        out = pipeline.prepare(inputs, encoding=encoding).inputs
    return pipeline.run, out["mm_encoder_outputs"]["image"].pooler_output, encoding.images


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("mixing", ["one-hot before", "one-hot"])
def test_one_hot_mixing_is_dropping(family: str, mixing: str) -> None:
    _, expected, _ = handed_over(family, Answers())
    _, found, _ = handed_over(family, Answers(mixing=mixing))
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_mixtures_before_the_projector_go_through_it(family: str) -> None:
    run, found, images = handed_over(family, Answers(mixing="noise before"))
    projector = tiny_model(family).base_model.multi_modal_projector
    for selection, features, image in zip(run.selections, found, images, strict=True):
        sources = image.projector_inputs().flatten(0, 1)
        with torch.no_grad():
            expected = projector(selection.mixing @ sources)
        tokens = features[image.geometry.packed[selection.packed_mask()] != NEWLINE]
        assert torch.allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_an_order_moves_tokens_and_leaves_newlines(family: str) -> None:
    run, expected, images = handed_over(family, Answers())
    _, found, _ = handed_over(family, Answers(backwards=True))
    for selection, one, other, image in zip(run.selections, expected, found, images, strict=True):
        token = image.geometry.packed[selection.packed_mask()] != NEWLINE
        assert torch.equal(one[~token], other[~token])
        assert torch.equal(one[token].flip(0), other[token])


def test_a_mixing_matrix_or_an_order_that_does_not_fit_is_refused() -> None:
    @dataclass
    class Wrong(Answers):
        def select(self, image: EncodedImage) -> Selection:
            chosen = super().select(image)
            wrong = torch.zeros(3, 3) if self.mixing == "none" else None
            return replace(chosen, mixing=wrong, order=torch.zeros(chosen.kept_tokens, dtype=torch.long))

    image = random_encoded_image(WIDE)
    with pytest.raises(ValueError, match=r"mixing matrix of \[3, 3\]; with \d+ kept tokens it must be \[\d+, 64\]"):
        Wrong().reduce(image)
    with pytest.raises(ValueError, match="an order that is no permutation"):
        Wrong(mixing="x").reduce(image)


def test_merging_at_half_precision_sums_in_single() -> None:
    weights = torch.full((1, 4096), 1 / 4096)
    sources = torch.full((4096, 2), 3.0, dtype=torch.bfloat16)
    assert mix(weights, sources).tolist() == [[3.0, 3.0]]


def test_trim_needs_a_text_model() -> None:
    with pytest.raises(ValueError, match=r"TRIM reads the question.*set text_model"), TRIM()(tiny_model("llava")):
        pass
