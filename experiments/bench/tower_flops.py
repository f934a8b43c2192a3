"""Counts the FLOPs of a vision tower, with the strategies before and inside it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenprune.adapter import Adapter
from tokenprune.experiments.bench.flop_counter import create_flop_counter
from tokenprune.experiments.bench.phase_timer import TOWER_PHASES, PhaseTimer, instrument
from tokenprune.pipeline import Pipeline


def count_tower_flops(adapter: Adapter, encode: Callable[[], object], pipeline: Pipeline | None = None) -> int:
    """Return the FLOPs of the vision tower in a call, without the projector, as torch counts them.

    Args:
        adapter: the adapter of the model.
        encode: runs the vision tower.
        pipeline: the pipeline that `encode` calls; None if it calls none.
    """
    with torch.no_grad(), create_flop_counter() as counter:
        timer = PhaseTimer(counter.get_total_flops)
        with instrument(adapter, timer, pipeline):
            encode()
            timer.flush()
    return int(sum(timer.spent.get(phase, 0) for phase in TOWER_PHASES))
