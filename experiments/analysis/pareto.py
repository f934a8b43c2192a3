"""The Pareto front of points."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points on the Pareto front, cheapest first.

    A point is on the front if no other point is better in both cost and score.

    Args:
        points: cost (less is better) and score (more is better) of each point.
    """
    order = sorted(
        (index for index, point in enumerate(points) if not any(map(math.isnan, point))),
        key=lambda index: (points[index][0], -points[index][1]),
    )
    front: list[int] = []
    for index in order:
        # Identical points do not dominate each other.
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front
