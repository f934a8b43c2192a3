"""A tiny model of the benchmark and a clock that tests advance."""

from __future__ import annotations

from tokenprune.experiments.bench.measure import Workload

SIZES = [[(112, 56)], [(112, 56)]]
SETTING = Workload(2, (112, 56))


class ManualClock:
    """A clock that advances only by calls of `advance`."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def advance(self, ticks: float) -> None:
        self.time += ticks
