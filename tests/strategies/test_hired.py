"""Test HiRED: recorded masks of the release, the tokens that the release loses, and that `HiRED()` loses none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from research.emulators import pack_with_swapped_grid
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED
from tokenprune.strategies.components.allocation import VisualContentAllocation
from tokenprune.testing.encoded_images import random_encoded_image

SIDE, TOKENS = 24, 576
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "hired_release_masks.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files})


def read_golden(case: str, name: str) -> np.ndarray:
    return GOLDEN[f"{case}/{name}"]


def build_image(geometry: TileGeometry, allocation: Tensor, selection: Tensor) -> EncodedImage:
    """Build an image of a 24-layer tower from CLS attention that is already summed over heads."""
    signals = {("cls_attention", 0): allocation[:, None], ("cls_attention", 22): selection[:, None]}
    features = torch.zeros(geometry.tiles, geometry.tokens, 1)
    return EncodedImage(geometry, features, signals, layers=24, feature_layer=22)


def build_release_layout(tile_grid: tuple[int, int]) -> TileGeometry:
    """Build a layout in which every token of every tile is valid, because the release selects before unpadding."""
    sub_images = tile_grid[0] * tile_grid[1]
    return TileGeometry(tile_grid, (SIDE, SIDE), torch.zeros(sub_images, 4), torch.arange((1 + sub_images) * TOKENS))


def build_golden_image(case: str, geometry: TileGeometry) -> EncodedImage:
    allocation = torch.from_numpy(read_golden(case, "allocation_scores"))
    return build_image(geometry, allocation, torch.from_numpy(read_golden(case, "selection_scores")))


def read_tile_grid(case: str) -> tuple[int, int]:
    rows, cols = read_golden(case, "grid").tolist()
    return rows, cols


def test_twelve_cases_were_recorded() -> None:
    assert len(CASES) == 12


@pytest.mark.parametrize("case", CASES)
def test_release_equals_the_recorded_masks(case: str) -> None:
    reducer = HiRED.release(float(read_golden(case, "budget")), float(read_golden(case, "alpha")))
    selection = reducer.reduce(build_golden_image(case, build_release_layout(read_tile_grid(case))))
    assert torch.equal(selection.kept, torch.from_numpy(read_golden(case, "kept")))


@pytest.mark.parametrize("case", CASES)
def test_each_option_of_the_release_changes_the_mask(case: str) -> None:
    """Masks of other statistics and regions differ, so the golden test detects a change of the preset."""
    budget, alpha = float(read_golden(case, "budget")), float(read_golden(case, "alpha"))
    image = build_golden_image(case, build_release_layout(read_tile_grid(case)))
    kept = torch.from_numpy(read_golden(case, "kept"))
    variants = {
        "mass": {"region": "stripe", "rounding": "floor"},
        "quadrant": {"region": "quadrant", "statistic": "top_count", "rounding": "floor"},
    }
    has_one_column = read_tile_grid(case)[1] == 1  # with one column, stripes equal quadrants
    for name, options in variants.items():
        allocation = VisualContentAllocation(alpha, **options)  # type: ignore[arg-type]
        is_equal = torch.equal(HiRED(budget, allocation=allocation, padding="ignore").reduce(image).kept, kept)
        assert is_equal == (name == "quadrant" and has_one_column), name


def count_llm_tokens(kept: Tensor, image_size: tuple[int, int], true_grid: tuple[int, int]) -> int:
    """Count the tokens of a release mask that its model feeds to the LLM.

    Emulates four properties of the release's fork of LLaVA-NeXT: (1) the tile grid has height and width swapped, so
    sub-images cut as rows x cols are packed as cols x rows; (2) LLaVA's `unpad_image` is applied to that canvas, in
    tokens, with the true height and width of the image; (3) unpadding follows selection, so selected tokens that it
    removes are lost; (4) there are no newline tokens. The base tile stays unchanged. No other part is emulated.
    """
    layout = TileGeometry.anyres(image_size, true_grid, (SIDE, SIDE), 336)
    packed = pack_with_swapped_grid(layout, image_size, 336)
    return int(kept.flatten()[packed[packed != NEWLINE]].sum())


# Measured on the release: image size, tile grid, budget, asked tokens, tokens in the mask, tokens in the LLM.
PUBLISHED = [
    ((600, 600), (2, 2), 0.2, 576, 576, 576),
    ((600, 600), (2, 2), 0.05, 144, 143, 143),
    ((400, 1000), (1, 3), 0.2, 460, 458, 257),
    ((1000, 400), (3, 1), 0.2, 460, 459, 260),
    ((336, 672), (1, 2), 0.2, 345, 344, 212),
    ((336, 672), (1, 2), 0.4, 691, 690, 429),
]


@pytest.mark.parametrize(("size", "grid", "budget", "asked", "expected_in_mask", "expected_llm_tokens"), PUBLISHED)
def test_the_loss_of_the_release_on_other_attention(
    size, grid, budget, asked, expected_in_mask, expected_llm_tokens
) -> None:
    """The release loses about as many tokens with random attention as it lost on the measured model.

    `asked` is exact. The mask may lack one token per rounding (three or four). The count of tokens in the LLM
    differs from the table, because it depends on the positions of tokens in the strip that unpadding keeps.
    """
    geometry = build_release_layout(grid)
    image = random_encoded_image(geometry, seed=3, heads=4)
    selection = HiRED.release(budget).reduce(image)
    assert selection.asked == asked
    assert abs(selection.kept_tokens - expected_in_mask) <= geometry.tiles
    assert selection.kept_tokens <= asked
    llm_tokens = count_llm_tokens(selection.kept, size, grid)
    if grid[0] == grid[1]:
        assert llm_tokens == selection.kept_tokens
    else:
        assert abs(llm_tokens - expected_llm_tokens) <= 15
        assert 0.5 < llm_tokens / asked < 0.65
    repaired = HiRED(budget).reduce(
        random_encoded_image(TileGeometry.anyres(size, grid, (SIDE, SIDE), 336), seed=3, heads=4)
    )
    assert repaired.kept_tokens == repaired.asked == asked
    assert not bool((repaired.kept & ~repaired.geometry.valid).any())


@pytest.mark.parametrize("case", CASES)
def test_golden_masks_lose_tokens_and_the_repaired_method_does_not(case: str) -> None:
    """Recorded masks lose tokens in the emulation; `HiRED()` on the same signals and the true layout loses none."""
    kept, grid = torch.from_numpy(read_golden(case, "kept")), read_tile_grid(case)
    height, width = read_golden(case, "image_size").tolist()
    in_mask, llm_tokens = int(kept.sum()), count_llm_tokens(kept, (height, width), grid)
    if height == width:
        assert llm_tokens == in_mask
    elif grid[0] != grid[1]:
        assert int(kept[0].sum()) <= llm_tokens < 0.85 * in_mask  # only sub-images lose tokens, more than 15 % in all
    else:
        assert llm_tokens < in_mask  # swapping a square grid has no effect, but the budget includes padding
    budget, alpha = float(read_golden(case, "budget")), float(read_golden(case, "alpha"))
    geometry = TileGeometry.anyres((height, width), grid, (SIDE, SIDE), 336)
    repaired = HiRED(budget, allocation=VisualContentAllocation(alpha)).reduce(build_golden_image(case, geometry))
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


def build_image_with_hot_quadrant(corner: int) -> EncodedImage:
    """Build a square image whose attention in the first layer lies in one quadrant of the base tile."""
    geometry = TileGeometry.anyres((672, 672), (2, 2), (SIDE, SIDE), 336)
    attention = torch.full((SIDE, SIDE), 1e-6)
    row, col = divmod(corner, 2)
    attention[row * 12 : row * 12 + 12, col * 12 : col * 12 + 12] = 1 / 144
    return build_image(geometry, attention.reshape(1, -1).expand(5, -1), torch.rand(5, TOKENS))


@pytest.mark.parametrize("corner", range(4))
def test_content_goes_to_the_sub_image_that_shows_it(corner: int) -> None:
    """The repaired method grants the tokens to the sub-image with the content; stripes grant about half elsewhere."""
    image = build_image_with_hot_quadrant(corner)
    granted = HiRED(400).reduce(image).granted_per_tile
    assert granted[0] == 200
    assert granted[1 + corner] >= 199
    stripes = HiRED.release(400).reduce(image).granted_per_tile[1:]
    assert stripes[corner] < 120
    assert HiRED.paper(400).reduce(image).granted_per_tile[1 + corner] >= 198


def test_options_of_the_presets() -> None:
    assert HiRED() == HiRED(0.2, allocation=VisualContentAllocation(0.5, "first", "exact", "mass"))
    assert HiRED.paper().allocation == VisualContentAllocation(0.5, "first", "quadrant", "mass", "floor")
    assert HiRED.release().allocation == VisualContentAllocation(0.5, "first", "stripe", "top_count", "floor")
    assert (HiRED().newlines, HiRED.paper().newlines, HiRED.release().newlines) == ("keep_rows", "keep_rows", "drop")
    assert [preset.padding for preset in (HiRED(), HiRED.paper(), HiRED.release())] == ["exclude", "ignore", "ignore"]
    assert [(signal.kind, signal.layer) for signal in HiRED().needs] == [
        ("cls_attention", "first"),
        ("cls_attention", "feature"),
    ]


@pytest.mark.parametrize("preset", [HiRED, HiRED.paper, HiRED.release])
def test_a_single_tile_keeps_the_top_tokens_of_the_feature_layer(preset) -> None:
    image = build_image(TileGeometry.single((SIDE, SIDE)), torch.rand(1, TOKENS), torch.rand(1, TOKENS))
    selection: Selection = preset(0.2).reduce(image)
    top = image.cls_attention("feature").sum(1)[0].argsort(descending=True)[:115]
    assert sorted(top.tolist()) == selection.kept[0].nonzero().flatten().tolist()


def test_paper_counts_by_hand() -> None:
    """The base tile gets 50 tokens; the sub-images share 51 tokens as 1 : 2 : 3 : 4, each quota rounded down."""
    geometry = TileGeometry.anyres((672, 672), (2, 2), (SIDE, SIDE), 336)
    attention = torch.zeros(SIDE, SIDE)
    for corner in range(4):
        row, col = divmod(corner, 2)
        attention[row * 12 : row * 12 + 12, col * 12 : col * 12 + 12] = (corner + 1) / 1440
    image = build_image(geometry, attention.reshape(1, -1).expand(5, -1), torch.rand(5, TOKENS))
    paper = HiRED.paper(101).reduce(image)
    assert paper.granted_per_tile[0] == 50
    quotas = [5.1, 10.2, 15.3, 20.4]
    assert paper.granted_per_tile[1:] == [int(quota) for quota in quotas]
    assert paper.asked == 101
    assert HiRED(101).reduce(image).granted_per_tile == [51, 5, 10, 15, 20]  # quotas 50.5, 5.05, 10.1, 15.15, 20.2
