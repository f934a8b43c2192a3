"""Runs the stages of a training, saves their state, and exports checkpoints."""

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from research.mini_training.build import export
from research.mini_training.train import set_rates
from tokenprune.models.mini.pages import GRIDS, list_words

SAVE_SECONDS = 300.0
"""Seconds between two saved states."""


@dataclass(frozen=True)
class Stage:
    """A stage of a training.

    Attributes:
        steps: Number of steps.
        rates: Factors of the learning rate as (step, factor), with linear interpolation.
        make_optimizers: Returns the optimizers of the stage.
        compute: Returns the loss and the scores of a step of the stage.
    """

    steps: int
    rates: Sequence[tuple[int, float]]
    make_optimizers: Callable[[], list[torch.optim.Optimizer]]
    compute: Callable[[int], tuple[Tensor, dict[str, float]]]


def run_stages(
    out: Path,
    model: Any,
    heads: nn.Module,
    stages: Sequence[Stage],
    *,
    resume: bool = False,
    stop_after: int | None = None,
) -> None:
    """Train a model of boards and pages in stages and export ``out/checkpoint``.

    The state is saved every few minutes, after each stage and after the last step.

    Args:
        out: Folder of the state, the log and the checkpoint.
        model: The model.
        heads: Heads that are trained with the model and not exported.
        stages: The stages.
        resume: Whether to resume from the state in ``out``.
        stop_after: Number of steps of all stages after which to stop; the run can be resumed later.

    Raises:
        ValueError: If the completed stages of the saved state have other numbers of steps, or if the current stage has
            fewer steps than were done.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends = list(accumulate(stage.steps for stage in stages))
    state: dict[str, Any] = {"done": 0, "seconds": 0.0}
    if resume:
        state = torch.load(out / "state.pt", weights_only=True)
        saved_ends = state.get("ends", [])
        completed = [end for end in saved_ends if end < state["done"]]
        if not saved_ends or ends[: len(completed)] != completed or max(ends[: len(completed) + 1]) < state["done"]:
            raise ValueError(
                f"the state in {out} was saved after {state['done']} steps of stages that end at {saved_ends}; here "
                f"they end at {ends}; resume with the same numbers of steps, or start in another folder"
            )
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
    optimizers: list[torch.optim.Optimizer] = []
    since, saved_at = time.monotonic() - state["seconds"], time.monotonic()
    last = ends[-1] if stop_after is None else min(ends[-1], stop_after)
    model.train()
    for done in range(state["done"], last):
        number = bisect_right(ends, done)
        stage, step = stages[number], done - (ends[number] - stages[number].steps)
        if step == 0 or not optimizers:
            optimizers = stage.make_optimizers()
            for optimizer, saved in zip(optimizers, state["optimizers"] if step else (), strict=bool(step)):
                optimizer.load_state_dict(saved)
        set_rates(optimizers, step, stage.rates)
        loss, scores = stage.compute(step)
        loss.backward()
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)  # also of parameters that only another stage trains
        heads.zero_grad(set_to_none=True)
        entry = {"step": done + 1, "seconds": time.monotonic() - since, "loss": loss.item(), **scores}
        line = json.dumps({name: round(value, 4) for name, value in entry.items()})
        with (out / "log.jsonl").open("a") as log:
            log.write(line + "\n")
        if (done + 1) % 25 == 0:
            print(line, flush=True)
        if done + 1 in (*ends, last) or time.monotonic() - saved_at > SAVE_SECONDS:
            new = {"model": model.state_dict(), "heads": heads.state_dict(), "done": done + 1, "ends": ends}
            new |= {"seconds": entry["seconds"], "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save(new, out / "state.new")
            (out / "state.new").rename(out / "state.pt")
            export(model, out / "checkpoint", list_words(), GRIDS)
            saved_at = time.monotonic()
