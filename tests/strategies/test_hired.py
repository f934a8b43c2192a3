"""HiRED: the release's recorded output token for token, what it loses, and that the repaired method loses nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from research.emulated import pack_with_swapped_grid
from tokenprune.image import NEWLINE, EncodedImage, TileGeometry
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED
from tokenprune.strategies.components.allocation import VisualContentAllocation
from tokenprune.testing.encoded_images import random_encoded_image

SIDE, TOKENS = 24, 576
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "hired_release_masks.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files})


def golden(case: str, name: str) -> np.ndarray:
    return GOLDEN[f"{case}/{name}"]


def with_signals(geometry: TileGeometry, allocation: Tensor, selection: Tensor) -> EncodedImage:
    """An image of a 24-layer tower whose heads are summed already."""
    signals = {("cls_attention", 0): allocation[:, None], ("cls_attention", 22): selection[:, None]}
    features = torch.zeros(geometry.tiles, geometry.tokens, 1)
    return EncodedImage(geometry, features, signals, layers=24, feature_layer=22)


def as_the_release_sees_it(tile_grid: tuple[int, int]) -> TileGeometry:
    """The release selects before anything is unpadded: every token of every tile is a candidate."""
    sub_images = tile_grid[0] * tile_grid[1]
    return TileGeometry(tile_grid, (SIDE, SIDE), torch.zeros(sub_images, 4), torch.arange((1 + sub_images) * TOKENS))


def golden_image(case: str, geometry: TileGeometry) -> EncodedImage:
    allocation = torch.from_numpy(golden(case, "allocation_scores"))
    return with_signals(geometry, allocation, torch.from_numpy(golden(case, "selection_scores")))


def tile_grid(case: str) -> tuple[int, int]:
    rows, cols = golden(case, "grid").tolist()
    return rows, cols


def test_twelve_cases_were_recorded() -> None:
    assert len(CASES) == 12


@pytest.mark.parametrize("case", CASES)
def test_release_equals_the_recorded_masks_token_for_token(case: str) -> None:
    reducer = HiRED.release(float(golden(case, "budget")), float(golden(case, "alpha")))
    selection = reducer.reduce(golden_image(case, as_the_release_sees_it(tile_grid(case))))
    assert torch.equal(selection.kept, torch.from_numpy(golden(case, "kept")))


@pytest.mark.parametrize("case", CASES)
def test_each_part_of_the_release_matters(case: str) -> None:
    """Otherwise the golden test would pass whatever the presets say: mass, even quadrants and exact rounding differ."""
    budget, alpha = float(golden(case, "budget")), float(golden(case, "alpha"))
    image = golden_image(case, as_the_release_sees_it(tile_grid(case)))
    kept = torch.from_numpy(golden(case, "kept"))
    others = {
        "mass": {"region": "stripe", "rounding": "floor"},
        "quadrant": {"region": "quadrant", "statistic": "top_count", "rounding": "floor"},
    }
    one_column = tile_grid(case)[1] == 1  # there, stripes are the quadrants
    for name, options in others.items():
        allocation = VisualContentAllocation(alpha, **options)  # type: ignore[arg-type]
        same = torch.equal(HiRED(budget, allocation=allocation, padding="ignore").reduce(image).kept, kept)
        assert same == (name == "quadrant" and one_column), name


def reached(kept: Tensor, image_size: tuple[int, int], true_grid: tuple[int, int]) -> int:
    """Count the tokens of a release mask that its model feeds to the LLM.

    Emulated of the release's fork of LLaVA-NeXT: (1) the tile grid comes out with height and width exchanged, so that
    sub-images cut as rows x cols are laid out as cols x rows; (2) LLaVA's `unpad_image` is applied to that canvas, in
    tokens, with the image's true height and width; (3) it happens after selection: chosen tokens that it cuts away
    are gone; (4) no newline tokens. The base tile is not touched. Nothing else of the model is emulated.
    """
    layout = TileGeometry.anyres(image_size, true_grid, (SIDE, SIDE), 336)
    places = pack_with_swapped_grid(layout, image_size, 336)
    return int(kept.flatten()[places[places != NEWLINE]].sum())


PUBLISHED = [  # measured on the release: image size, tile grid, budget, asked, in the mask, reached the LLM
    ((600, 600), (2, 2), 0.2, 576, 576, 576),
    ((600, 600), (2, 2), 0.05, 144, 143, 143),
    ((400, 1000), (1, 3), 0.2, 460, 458, 257),
    ((1000, 400), (3, 1), 0.2, 460, 459, 260),
    ((336, 672), (1, 2), 0.2, 345, 344, 212),
    ((336, 672), (1, 2), 0.4, 691, 690, 429),
]


@pytest.mark.parametrize(("size", "grid", "budget", "asked", "in_mask", "fed"), PUBLISHED)
def test_the_loss_of_the_release_on_other_attention(size, grid, budget, asked, in_mask, fed) -> None:
    """The table was measured on a model; here attention is random, so counts agree up to where single tokens fall.

    `asked` is exact. The mask may lack one token for each rounding (three or four of them). What reaches the LLM
    differs from the table by the luck of which tokens lie in the strip that survives.
    """
    geometry = as_the_release_sees_it(grid)
    image = random_encoded_image(geometry, seed=3, heads=4)
    selection = HiRED.release(budget).reduce(image)
    assert selection.asked == asked
    assert abs(selection.kept_tokens - in_mask) <= geometry.tiles
    assert selection.kept_tokens <= asked
    got = reached(selection.kept, size, grid)
    if grid[0] == grid[1]:
        assert got == selection.kept_tokens
    else:
        assert abs(got - fed) <= 15
        assert 0.5 < got / asked < 0.65
    repaired = HiRED(budget).reduce(
        random_encoded_image(TileGeometry.anyres(size, grid, (SIDE, SIDE), 336), seed=3, heads=4)
    )
    assert repaired.kept_tokens == repaired.asked == asked
    assert not bool((repaired.kept & ~repaired.geometry.valid).any())


@pytest.mark.parametrize("case", CASES)
def test_golden_masks_lose_tokens_where_the_repaired_method_loses_none(case: str) -> None:
    """The recorded masks, put through the same emulation; and `HiRED()` on the same signals with the true layout."""
    kept, grid = torch.from_numpy(golden(case, "kept")), tile_grid(case)
    height, width = golden(case, "image_size").tolist()
    in_mask, got = int(kept.sum()), reached(kept, (height, width), grid)
    if height == width:
        assert got == in_mask
    elif grid[0] != grid[1]:
        assert int(kept[0].sum()) <= got < 0.85 * in_mask  # only sub-images lose, and they lose a lot
    else:
        assert got < in_mask  # no exchange to see in a square grid, but padding was paid for
    budget, alpha = float(golden(case, "budget")), float(golden(case, "alpha"))
    geometry = TileGeometry.anyres((height, width), grid, (SIDE, SIDE), 336)
    repaired = HiRED(budget, allocation=VisualContentAllocation(alpha)).reduce(golden_image(case, geometry))
    asked = int(kept.shape[0] * TOKENS * round(budget * 100)) // 100
    assert repaired.kept_tokens == repaired.asked == asked


@pytest.mark.parametrize("size", [(300, 900), (900, 300), (500, 700), (700, 500), (640, 480), (33, 990), (672, 672)])
@pytest.mark.parametrize("budget", [0.05, 0.2, 0.4, 77])
def test_repaired_budget_is_exact_on_every_aspect_ratio(size, budget) -> None:
    grid = (2, 2) if max(size) / min(size) < 2 else ((1, 3) if size[1] > size[0] else (3, 1))
    geometry = TileGeometry.anyres(size, grid, (SIDE, SIDE), 336)
    selection = HiRED(budget).reduce(random_encoded_image(geometry, heads=4))
    assert selection.kept_tokens == min(selection.asked, int(geometry.valid.sum()))
    assert selection.kept_tokens == selection.asked or size == (33, 990)
    assert int(selection.budgets.sum()) == selection.kept_tokens


def hot_corner(corner: int) -> EncodedImage:
    """A square image whose early attention lies in one quadrant of the base tile."""
    geometry = TileGeometry.anyres((672, 672), (2, 2), (SIDE, SIDE), 336)
    attention = torch.full((SIDE, SIDE), 1e-6)
    row, col = divmod(corner, 2)
    attention[row * 12 : row * 12 + 12, col * 12 : col * 12 + 12] = 1 / 144
    return with_signals(geometry, attention.reshape(1, -1).expand(5, -1), torch.rand(5, TOKENS))


@pytest.mark.parametrize("corner", range(4))
def test_content_goes_to_the_sub_image_that_shows_it(corner: int) -> None:
    """The repaired method pays the sub-image with the content; the release's stripes pay half of it elsewhere."""
    image = hot_corner(corner)
    granted = HiRED(400).reduce(image).granted_per_tile
    assert granted[0] == 200
    assert granted[1 + corner] >= 199
    stripes = HiRED.release(400).reduce(image).granted_per_tile[1:]
    assert stripes[corner] < 120
    assert HiRED.paper(400).reduce(image).granted_per_tile[1 + corner] >= 198


def test_presets_say_what_they_are() -> None:
    assert HiRED() == HiRED(0.2, allocation=VisualContentAllocation(0.5, "first", "exact", "mass"))
    assert HiRED.paper().allocation == VisualContentAllocation(0.5, "first", "quadrant", "mass", "floor")
    assert HiRED.release().allocation == VisualContentAllocation(0.5, "first", "stripe", "top_count", "floor")
    assert (HiRED().newlines, HiRED.paper().newlines, HiRED.release().newlines) == ("keep_rows", "keep_rows", "drop")
    assert [one.padding for one in (HiRED(), HiRED.paper(), HiRED.release())] == ["exclude", "ignore", "ignore"]
    assert [(signal.kind, signal.layer) for signal in HiRED().needs] == [
        ("cls_attention", "first"),
        ("cls_attention", "feature"),
    ]


@pytest.mark.parametrize("preset", [HiRED, HiRED.paper, HiRED.release])
def test_one_tile_spends_everything_by_the_final_layer(preset) -> None:
    image = with_signals(TileGeometry.single((SIDE, SIDE)), torch.rand(1, TOKENS), torch.rand(1, TOKENS))
    selection: Selection = preset(0.2).reduce(image)
    top = image.cls_attention("feature").sum(1)[0].argsort(descending=True)[:115]
    assert sorted(top.tolist()) == selection.kept[0].nonzero().flatten().tolist()


def test_paper_counts_by_hand() -> None:
    """N = 100, N_0 = 50; content 1 : 2 : 3 : 4 of the other 50, each rounded down."""
    geometry = TileGeometry.anyres((672, 672), (2, 2), (SIDE, SIDE), 336)
    attention = torch.zeros(SIDE, SIDE)
    for corner in range(4):
        row, col = divmod(corner, 2)
        attention[row * 12 : row * 12 + 12, col * 12 : col * 12 + 12] = (corner + 1) / 1440
    image = with_signals(geometry, attention.reshape(1, -1).expand(5, -1), torch.rand(5, TOKENS))
    paper = HiRED.paper(101).reduce(image)
    assert paper.granted_per_tile[0] == 50
    expected = [5.1, 10.2, 15.3, 20.4]
    assert paper.granted_per_tile[1:] == [int(one) for one in expected]
    assert paper.asked == 101
    assert HiRED(101).reduce(image).granted_per_tile == [51, 5, 10, 15, 20]  # quotas 50.5, 5.05, 10.1, 15.15, 20.2
