"""ImageDownsample: encodes the image at a lower resolution, so that its tokens fit the budget.

Many published comparisons omit this baseline. Source: Liao et al., "Are We Using the Right Benchmark: An Evaluation
Framework for Visual Token Compression Methods", ACL 2026, arXiv 2510.07143. They report better results than FastV,
VisionZip, PruMerge+ and DART on most of their benchmarks, on Qwen2-VL-7B, whose tower supports any resolution.

A tiled model enlarges a smaller image again. So every tile is encoded with fewer patches here, which gives ``h x w``
tokens instead of ``H x W``. The code of the tower interpolates the position embeddings. ``h x w`` is the largest grid
whose valid tokens fit, with the aspect ratio of the tile within one token. This construction belongs to this library,
not to the paper. The number of tokens changes in steps, so the budget is an upper bound. Unlike all other strategies,
it also reduces the cost of the vision tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenprune.budget import as_budget
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.image_reducer import ImageReducer


@dataclass
class ImageDownsample(ImageReducer):
    """Encodes the image at the highest resolution whose tokens fit the budget."""

    published: ClassVar[str] = "compared in ACL 2026, arXiv 2510.07143"

    def token_grid(self, geometry: TileGeometry) -> tuple[int, int] | None:
        """Return the largest token grid that fits the budget, or None if one token per tile exceeds it."""
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
            is_counted = budget.newlines == "counted" and self.newlines != "drop"
            n_free = 0 if is_counted else int((packed == NEWLINE).sum())
            if len(packed) - n_free <= asked:
                return grid
        return None
