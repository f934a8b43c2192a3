"""What each saving in the vision side is worth: encodes in turns, from the plain model to all savings.

Run it: ``python -m tokenprune.experiments.bench.steps --model llava-v1.6-vicuna-7b --budget 0.2``

Savings are taken back by telling the adapter not to make them; nothing else differs. Only what makes the LLM's input is
run: tower, projector, packing, signals, choosing and rewriting.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from jsonargparse import ArgumentParser

from tokenprune.adapter import Encoding
from tokenprune.attach import Run
from tokenprune.experiments.bench.command import size_of
from tokenprune.experiments.bench.ledger import ENCODE, Ledger, watched
from tokenprune.experiments.bench.machine import environment, wait_for
from tokenprune.experiments.bench.measure import flop_counter, no_pictures, turns
from tokenprune.experiments.bench.spread import Ratio, Spread
from tokenprune.experiments.bench.subject import Subject, picture, subject
from tokenprune.experiments.selection_cost import torch_threads
from tokenprune.image import Signal
from tokenprune.models.placeholder import PlaceholderAdapter
from tokenprune.models.staged import StagedEncoding
from tokenprune.strategies import HiRED

Adapting = Callable[[PlaceholderAdapter], AbstractContextManager[Any]]


def _whole(adapter: PlaceholderAdapter) -> AbstractContextManager[Any]:
    """Encode images whole, before tokens are chosen."""
    return patch.object(adapter, "can_stage", lambda *given: False)


@contextmanager
def _all_layers(adapter: PlaceholderAdapter) -> Any:
    """Run the layers behind the last needed one, too."""
    with _whole(adapter), patch.object(adapter, "needed_part", lambda *given: nullcontext()):
        yield


def _together(adapter: PlaceholderAdapter) -> AbstractContextManager[Any]:
    """Run all tiles up to where it is known which are paid for."""
    return patch.object(StagedEncoding, "base_tiles", Encoding.base_tiles)


@contextmanager
def _all_outputs(adapter: PlaceholderAdapter) -> Any:
    """Run the whole last needed layer, as for a strategy that reads its outputs."""
    original = adapter.wanted

    def wanted(needs: Sequence[Signal], layer: int) -> dict[int, set[str]]:
        return original([*needs, Signal("vision_features", layer)], layer)

    with _together(adapter), patch.object(adapter, "wanted", wanted):
        yield


STEPS: Mapping[str, Adapting | None] = {
    "plain": None,
    "chosen afterwards": _all_layers,
    "needed layers": _whole,
    "projector on kept tokens": _all_outputs,
    "last layer on kept tokens": _together,
    "base tile first": lambda adapter: nullcontext(),
}
"""Each has what the one before it has; the last is what runs by default."""


@dataclass
class Step:
    """What was found about one step; seconds.

    Args:
        whole: of all, per round.
        phases: of each phase, per round.
        flops: FLOPs of each phase.
    """

    whole: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)


def encode(made: Subject, inputs: Mapping[str, Any], name: str, budget: float, ledger: Ledger) -> None:
    """Make what enters the LLM once, with some of the savings.

    Args:
        made: the model.
        inputs: its inputs.
        name: the step.
        budget: of HiRED.
        ledger: takes the bookings.
    """
    adapter, adapting = made.adapter, STEPS[name]
    assert isinstance(adapter, PlaceholderAdapter)
    with ExitStack() as undo:
        undo.enter_context(torch.inference_mode())
        undo.enter_context(no_pictures())
        run = None if adapting is None else Run(HiRED(budget), adapter)
        if adapting is not None:
            undo.enter_context(adapting(adapter))
        undo.enter_context(watched(adapter, ledger, run))
        wait_for(made.model.device)
        ledger.start()
        if run is None:
            made.model.base_model.get_image_features(**adapter.vision_arguments(inputs), return_dict=True)
        else:
            run.reduced(dict(inputs), generating=True)
        wait_for(made.model.device)
        ledger.settle()


def measure(
    made: Subject, size: tuple[int, int], budget: float, repeats: int, tell: Callable[[str], None]
) -> dict[str, Step]:
    """Measure all steps in turns.

    Args:
        made: the model.
        size: height x width of the picture in pixels.
        budget: of HiRED.
        repeats: timed rounds, after one that is not timed.
        tell: is told what is done.
    """
    inputs, found = made.prepare([picture(size, 0)]), {name: Step() for name in STEPS}

    def now() -> float:
        wait_for(made.model.device)
        return perf_counter()

    for name, step in found.items():
        tell(f"FLOPs of {name}")
        with flop_counter() as counter:
            booked = Ledger(counter.get_total_flops)
            encode(made, inputs, name, budget, booked)
        step.flops = {phase: int(spent) for phase, spent in booked.spent.items()}
    for number in range(repeats):
        tell(f"round {number + 1} of {repeats}")
        for name in turns(list(STEPS), number):
            booked = Ledger(now)
            encode(made, inputs, name, budget, booked)
            found[name].whole.append(sum(booked.spent.values()))
            for phase in ENCODE:
                found[name].phases.setdefault(phase, []).append(booked.spent.get(phase, 0.0))
    return found


def as_data(found: Mapping[str, Step]) -> dict[str, Any]:
    """Return all steps as plain data: each with its time as a share of the plain model's in the same round."""
    plain = found["plain"]
    return {
        name: {
            "ms": Spread(tuple(1e3 * one for one in step.whole)).as_data(),
            "of_plain": Ratio.of(step.whole, plain.whole).as_data(),
            "flops_of_plain": sum(step.flops.values()) / sum(plain.flops.values()),
            "phases_ms": {n: Spread(tuple(1e3 * one for one in took)).median for n, took in step.phases.items()},
            "phases_flops": step.flops,
        }
        for name, step in found.items()
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """Return the steps as a table: times with intervals as shares of the plain model's, and phases in milliseconds."""
    phases = [name for name in ENCODE if any(one["phases_ms"][name] >= 0.05 for one in result["steps"].values())]
    head = ["step", "time, of plain", "FLOPs, of plain", *(f"{name}, ms" for name in phases)]
    rows = [head, ["---"] * len(head)]
    for name, one in result["steps"].items():
        share = one["of_plain"]
        low, high = share["interval"]
        took = "1" if name == "plain" else f"{share['median']:.3f} [{low:.3f}, {high:.3f}]"
        rows.append([name, took, f"{one['flops_of_plain']:.3f}", *(f"{one['phases_ms'][n]:,.1f}" for n in phases)])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    coverage = 100 * next(iter(result["steps"].values()))["of_plain"]["coverage"]
    where = result["environment"]
    return (
        f"{result['model']['name']}, HiRED at {100 * result['budget']:g} %, {result['size']} pixels, "
        f"{result['repeats']} rounds in turns, medians, {coverage:.0f} % intervals; {where['device_name']}, "
        f"{where['threads']} threads, {result['model']['dtype']}, torch {where['torch']}, "
        f"transformers {where['transformers']}\n\n{table}\n"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = ArgumentParser(prog="python -m tokenprune.experiments.bench.steps", description=__doc__)
    add = parser.add_argument
    add("--model", default="llava-v1.6-vicuna-7b", help="as in `tokenprune bench run`; its LLM is cut to one layer")
    add("--budget", type=float, default=0.2, help="of HiRED, as a ratio")
    add("--size", type=str, default="672x672", help="height x width of the picture in pixels")
    add("--repeats", type=int, default=7, help="timed rounds")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--dtype", default="auto", help="auto (float32 on a CPU), float32, bfloat16, float16")
    add("--threads", type=int, help="CPU threads of torch; its own number if left out")
    add("--out", type=str, help="file for the JSON")
    config = parser.parse_args(words)
    try:
        size = size_of(config.size)
    except ValueError as error:
        parser.error(str(error).replace("--sizes", "--size"))
    with torch_threads(config.threads or torch.get_num_threads()):
        made = subject(config.model, config.device, config.dtype, None, 1)
        if not isinstance(made.adapter, PlaceholderAdapter) or not made.adapter.staged:
            parser.error(f"--model {config.model}: pictures of {made.adapter.family} are encoded whole")
        found = measure(made, size, config.budget, config.repeats, lambda text: print(text, file=sys.stderr))
        result = {
            "model": made.as_data(),
            "environment": environment(made.model.device),
            "budget": config.budget,
            "size": config.size,
            "repeats": config.repeats,
            "steps": as_data(found),
        }
    if config.out:
        Path(config.out).write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
