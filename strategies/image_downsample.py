"""ImageDownsample: the image is shrunk before it is encoded, until its tokens fit the budget.

The baseline that published comparisons forget: Liao et al., "Are We Using the Right Benchmark: An Evaluation Framework
for Visual Token Compression Methods", ACL 2026, arXiv 2510.07143, report that shrinking the image beats FastV,
VisionZip, PruMerge+ and DART on most of their benchmarks, on Qwen2-VL-7B, whose tower takes any resolution.

A tiled model would enlarge a smaller image again, so here every tile is encoded with fewer patches, ``h x w`` tokens
instead of ``H x W``, position embeddings interpolated by the tower's own code: the largest ``h x w`` whose valid tokens
fit, its sides in the proportion of the tile's within one token. That is this library's construction, not theirs. The
number of tokens jumps, so the budget is a ceiling. Unlike all others, it also saves work in the vision tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenprune.budget import as_budget
from tokenprune.image import NEWLINE, TileGeometry
from tokenprune.reducer import ImageReducer


@dataclass
class ImageDownsample(ImageReducer):
    """The image is encoded at the highest resolution whose tokens fit the budget."""

    published: ClassVar[str] = "compared in ACL 2026, arXiv 2510.07143"

    def token_grid(self, geometry: TileGeometry) -> tuple[int, int] | None:
        """Return the largest grid that fits, or None if not even one token a tile does."""
        budget, (height, width) = as_budget(self.budget), geometry.token_grid
        asked = budget.asked(geometry)
        grids = [
            (rows, cols)
            for rows in range(1, height + 1)
            for cols in range(1, width + 1)
            if abs(rows * width - cols * height) < max(height, width)
        ]
        for grid in sorted(grids, key=lambda grid: (-grid[0] * grid[1], grid)):
            packed = geometry.resized(grid)[0].packed
            free = 0 if budget.newlines == "counted" and self.newlines != "drop" else int((packed == NEWLINE).sum())
            if len(packed) - free <= asked:
                return grid
        return None
