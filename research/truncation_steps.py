"""What each saving of the vision side is worth: encodes in turns, from the plain model to all savings.

Run it: ``python -m research.truncation_steps --model llava-v1.6-vicuna-7b --budget 0.2``

Only the code that produces the inputs of the LLM runs: tower, projector, packing, capture, selection and rewriting.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jsonargparse import ArgumentParser

from tokenprune.budget import ratio_of
from tokenprune.experiments.bench.bench_model import BenchModel, image, subject
from tokenprune.experiments.bench.command import size_of
from tokenprune.experiments.bench.environment import environment, wait_for
from tokenprune.experiments.bench.measure import flop_counter, turns
from tokenprune.experiments.bench.phase_timer import ENCODE, PhaseTimer, instrument
from tokenprune.experiments.bench.samples import Ratio, Samples
from tokenprune.experiments.bench.selection_cost import torch_threads
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.pipeline import Pipeline
from tokenprune.strategies import HiRED


def _plain(pipeline: Pipeline, inputs: Mapping[str, Any]) -> None:
    """Run the unmodified vision side."""
    adapter = pipeline.adapter
    assert isinstance(adapter, PlaceholderAdapter)
    adapter.model.base_model.get_image_features(**adapter.vision_arguments(inputs), return_dict=True)


def _select_afterwards(pipeline: Pipeline, inputs: Mapping[str, Any]) -> None:
    """Encode images completely, then select tokens."""
    pipeline.prepare(inputs, generating=True, encoding=pipeline.encode(inputs))


def _project_all(pipeline: Pipeline, inputs: Mapping[str, Any]) -> None:
    """Stop the tower after the last required layer, and project every token."""
    encoding = pipeline.adapter.encode(inputs, pipeline.needs, truncated=True)
    encoding.tokens.all()
    pipeline.prepare(inputs, generating=True, encoding=encoding)


def _all_savings(pipeline: Pipeline, inputs: Mapping[str, Any]) -> None:
    """Run the default path: the projector runs on kept tokens only."""
    pipeline.prepare(inputs, generating=True)


STEPS: Mapping[str, Callable[[Pipeline, Mapping[str, Any]], None]] = {
    "plain": _plain,
    "selected afterwards": _select_afterwards,
    "required layers": _project_all,
    "projector on kept tokens": _all_savings,
}
"""Each step has the savings of the one before it; the last is the default."""


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


def encode(model: BenchModel, inputs: Mapping[str, Any], name: str, budget: float, ledger: PhaseTimer) -> None:
    """Produce the inputs of the LLM once, with the savings of a step.

    Args:
        model: the model.
        inputs: its inputs.
        name: the step.
        budget: of HiRED.
        ledger: takes the bookings.
    """
    pipeline = Pipeline(HiRED(budget), model.adapter, keep_pixels=False)
    with torch.inference_mode(), instrument(model.adapter, ledger, None if name == "plain" else pipeline):
        wait_for(model.model.device)
        ledger.start()
        STEPS[name](pipeline, inputs)
        wait_for(model.model.device)
        ledger.flush()


def measure(
    made: BenchModel, size: tuple[int, int], budget: float, repeats: int, tell: Callable[[str], None]
) -> dict[str, Step]:
    """Measure all steps in turns.

    Args:
        made: the model.
        size: height x width of the image in pixels.
        budget: of HiRED.
        repeats: timed rounds, after one that is not timed.
        tell: is told what is done.
    """
    inputs, found = made.prepare([image(size, 0)]), {name: Step() for name in STEPS}

    def now() -> float:
        wait_for(made.model.device)
        return perf_counter()

    for name, step in found.items():
        tell(f"FLOPs of {name}")
        with flop_counter() as counter:
            booked = PhaseTimer(counter.get_total_flops)
            encode(made, inputs, name, budget, booked)
        step.flops = {phase: int(spent) for phase, spent in booked.spent.items()}
    for number in range(repeats):
        tell(f"round {number + 1} of {repeats}")
        for name in turns(list(STEPS), number):
            booked = PhaseTimer(now)
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
            "ms": Samples(tuple(1e3 * one for one in step.whole)).as_data(),
            "of_plain": Ratio.of(step.whole, plain.whole).as_data(),
            "flops_of_plain": sum(step.flops.values()) / sum(plain.flops.values()),
            "phases_ms": {n: Samples(tuple(1e3 * one for one in took)).median for n, took in step.phases.items()},
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
    parser = ArgumentParser(prog="python -m research.truncation_steps", description=__doc__)
    add = parser.add_argument
    add("--model", default="llava-v1.6-vicuna-7b", help="as in `tokenprune bench run`; its LLM is cut to one layer")
    add("--budget", type=float | str, default=0.2, help="of HiRED, as a ratio: 0.2 or 20%%")
    add("--size", type=str, default="672x672", help="height x width of the image in pixels")
    add("--repeats", type=int, default=7, help="timed rounds")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--dtype", default="auto", help="auto (float32 on a CPU), float32, bfloat16, float16")
    add("--threads", type=int, help="CPU threads of torch; its own number if left out")
    add("--out", type=str, help="file for the JSON")
    config = parser.parse_args(words)
    try:
        size, budget = size_of(config.size), ratio_of(config.budget)
    except ValueError as error:
        parser.error(str(error).replace("--sizes", "--size"))
    with torch_threads(config.threads or torch.get_num_threads()):
        made = subject(config.model, config.device, config.dtype, None, 1)
        if not isinstance(made.adapter, PlaceholderAdapter) or not made.adapter.projects_per_token:
            parser.error(f"--model {config.model}: images of {made.adapter.family} pass the whole tower and projector")
        found = measure(made, size, budget, config.repeats, lambda text: print(text, file=sys.stderr))
        result = {
            "model": made.as_data(),
            "environment": environment(made.model.device),
            "budget": budget,
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
