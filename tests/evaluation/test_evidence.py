"""Coverage of the evidence by kept tokens, against areas computed by hand, and on the pages of the task."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tokenprune.experiments.evaluation.evidence import EvidenceTiles, Region, evidence_coverage
from tokenprune.experiments.evaluation.tasks import Boards, Pages, Task
from tokenprune.geometry import TileGeometry
from tokenprune.models.mini.boards import TILE
from tokenprune.models.mini.pages import CELL, pages

SIDE = TILE // CELL
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)
LEFT: Region = (0.0, 0.0, 1.0, 0.5)
RIGHT: Region = (0.0, 0.5, 1.0, 1.0)


def keep(geometry: TileGeometry, *tiles: int) -> torch.Tensor:
    """Return a mask that keeps all tokens of some tiles."""
    kept = torch.zeros(geometry.tiles, geometry.tokens, dtype=torch.bool)
    kept[list(tiles)] = True
    return kept


@pytest.mark.parametrize(
    ("kept", "regions", "tiles", "coverage"),
    [
        ((0,), [WHOLE], "base", 1.0),
        ((0,), [WHOLE], "tiles", 0.0),
        ((1,), [WHOLE], "base", 0.0),
        ((1,), [LEFT], "tiles", 1.0),
        ((1,), [RIGHT], "tiles", 0.0),
        ((1,), [(0.0, 0.25, 1.0, 0.75)], "tiles", 0.5),
        ((1,), [LEFT, RIGHT], "tiles", 0.5),
        ((1,), [LEFT, RIGHT], "either", 0.5),
        ((0, 1), [LEFT, RIGHT], "either", 1.0),
        ((0, 1), [LEFT, RIGHT], "base", 1.0),
        ((), [LEFT], "either", 0.0),
    ],
)
def test_coverage_is_the_share_of_the_area(
    kept: tuple[int, ...], regions: list[Region], tiles: EvidenceTiles, coverage: float
) -> None:
    geometry = TileGeometry.tiled((1, 2), (4, 4), base_first=True)
    assert evidence_coverage(geometry, keep(geometry, *kept), regions, tiles) == pytest.approx(coverage)


def test_a_layout_without_sub_images_has_its_evidence_in_the_base_tile() -> None:
    geometry = TileGeometry.single((2, 4))
    kept = torch.tensor([[True, True, False, False, True, False, False, False]])
    assert evidence_coverage(geometry, kept, [LEFT], "tiles") == pytest.approx(0.75)
    assert evidence_coverage(geometry, kept, [(0.0, 0.0, 0.5, 0.25)], "tiles") == pytest.approx(1.0)


def test_sub_images_without_valid_tokens_cover_nothing() -> None:
    layout = TileGeometry.tiled((1, 2), (2, 2), base_first=True)
    geometry = replace(layout, packed=layout.packed[: layout.tokens])
    assert evidence_coverage(geometry, keep(geometry, 0), [LEFT], "tiles") == 0
    assert evidence_coverage(geometry, keep(geometry, 0), [LEFT], "either") == 1


def test_evidence_of_a_padded_page_lies_at_its_cells() -> None:
    """Exactly the patches at the cells of the evidence cover it, on pages with and without padding."""
    n_padded = 0
    for page in pages(12):
        n_padded += page.offset != (0, 0)
        height, width = page.pixels.shape[:2]
        geometry = TileGeometry.anyres((height, width), page.grid, (SIDE, SIDE), TILE)
        for question in page.questions:
            if question.needs == "base" or page.layout == "chart":  # bars end inside a cell
                continue
            canvas = torch.zeros(page.grid[0] * SIDE, page.grid[1] * SIDE, dtype=torch.bool)
            for box in question.evidence:
                top, left, bottom, right = (int(value + page.offset[k % 2]) // CELL for k, value in enumerate(box))
                canvas[top:bottom, left:right] = True
            tokens = canvas.view(page.grid[0], SIDE, page.grid[1], SIDE).transpose(1, 2).reshape(-1, SIDE * SIDE)
            kept = torch.cat([torch.zeros(1, SIDE * SIDE, dtype=torch.bool), tokens])
            regions = [(t / height, x / width, b / height, r / width) for t, x, b, r in question.evidence]
            assert evidence_coverage(geometry, kept, regions, "tiles") == pytest.approx(1.0)
            assert evidence_coverage(geometry, ~kept, regions, "tiles") == pytest.approx(0.0, abs=1e-6)
    assert n_padded


@pytest.mark.parametrize("task", [Boards(number=3), Pages(number=3)])
def test_the_evidence_of_shipped_tasks_lies_inside_the_image(task: Task) -> None:
    for sample in task.samples():
        assert sample.evidence or sample.type == "paper"
        for top, left, bottom, right in sample.evidence:
            assert 0 <= top < bottom <= 1
            assert 0 <= left < right <= 1
