"""Measures the time that each step of the truncated encoding saves, from the plain model to all savings.

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

from tokenprune.budget import parse_ratio
from tokenprune.experiments.bench.bench_model import BenchModel, load_bench_model, parse_image_size, random_image
from tokenprune.experiments.bench.environment import describe_environment, wait_for
from tokenprune.experiments.bench.flop_counter import create_flop_counter
from tokenprune.experiments.bench.measure import round_order
from tokenprune.experiments.bench.phase_timer import ENCODE_PHASES, PhaseTimer, instrument
from tokenprune.experiments.bench.samples import Ratio, Samples
from tokenprune.experiments.bench.selection_cost import torch_threads
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.pipeline import Pipeline
from tokenprune.strategies import HiRED


def _plain(pipeline: Pipeline, inputs: Mapping[str, Any]) -> None:
    """Run the unmodified vision tower and projector."""
    adapter = pipeline.adapter
    assert isinstance(adapter, PlaceholderAdapter)
    adapter.model.base_model.get_image_features(**adapter.vision_arguments(inputs), return_dict=True)


def _select_afterwards(pipeline: Pipeline, inputs: Mapping[str, Any]) -> None:
    """Encode images completely, then select tokens."""
    pipeline.prepare(inputs, for_generate=True, encoding=pipeline.encode(inputs))


def _project_all(pipeline: Pipeline, inputs: Mapping[str, Any]) -> None:
    """Stop the tower after the last required layer, and project every token."""
    encoding = pipeline.adapter.encode(inputs, pipeline.needs, truncated=True)
    encoding.tokens.all()
    pipeline.prepare(inputs, for_generate=True, encoding=encoding)


def _all_savings(pipeline: Pipeline, inputs: Mapping[str, Any]) -> None:
    """Run the default path: the projector runs on kept tokens only."""
    pipeline.prepare(inputs, for_generate=True)


STEPS: Mapping[str, Callable[[Pipeline, Mapping[str, Any]], None]] = {
    "plain": _plain,
    "selected afterwards": _select_afterwards,
    "required layers": _project_all,
    "projector on kept tokens": _all_savings,
}
"""Each step includes the savings of the previous step; the last step is the default."""


@dataclass
class Step:
    """Measured times and FLOPs of one step.

    Args:
        seconds: total time of each round in seconds.
        phases: time of each phase in each round in seconds.
        flops: FLOPs of each phase.
    """

    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)


def encode_step(model: BenchModel, inputs: Mapping[str, Any], name: str, budget: float, timer: PhaseTimer) -> None:
    """Produce the inputs of the LLM once, with the savings of a step.

    Args:
        model: the model.
        inputs: the inputs of the model.
        name: name of the step.
        budget: budget of HiRED as a ratio.
        timer: records the time of each phase.
    """
    pipeline = Pipeline(HiRED(budget), model.adapter, keep_pixels=False)
    with torch.inference_mode(), instrument(model.adapter, timer, None if name == "plain" else pipeline):
        wait_for(model.model.device)
        timer.start()
        STEPS[name](pipeline, inputs)
        wait_for(model.model.device)
        timer.flush()


def measure_steps(
    model: BenchModel, size: tuple[int, int], budget: float, repeats: int, on_progress: Callable[[str], None]
) -> dict[str, Step]:
    """Measure all steps in alternating rounds, and return them by name.

    Args:
        model: the model.
        size: height x width of the image in pixels.
        budget: budget of HiRED as a ratio.
        repeats: number of timed rounds, after one round without timing.
        on_progress: called with a description of the next action.
    """
    inputs, steps = model.prepare([random_image(size, 0)]), {name: Step() for name in STEPS}

    def now() -> float:
        wait_for(model.model.device)
        return perf_counter()

    for name, step in steps.items():
        on_progress(f"FLOPs of {name}")
        with create_flop_counter() as counter:
            timer = PhaseTimer(counter.get_total_flops)
            encode_step(model, inputs, name, budget, timer)
        step.flops = {phase: int(spent) for phase, spent in timer.spent.items()}
    for number in range(repeats):
        on_progress(f"round {number + 1} of {repeats}")
        for name in round_order(list(STEPS), number):
            timer = PhaseTimer(now)
            encode_step(model, inputs, name, budget, timer)
            steps[name].seconds.append(sum(timer.spent.values()))
            for phase in ENCODE_PHASES:
                steps[name].phases.setdefault(phase, []).append(timer.spent.get(phase, 0.0))
    return steps


def as_data(steps: Mapping[str, Step]) -> dict[str, Any]:
    """Return all steps as JSON data, with times as a share of the time of the plain model in the same round."""
    plain = steps["plain"]
    return {
        name: {
            "ms": Samples(tuple(1e3 * seconds for seconds in step.seconds)).as_data(),
            "of_plain": Ratio.of(step.seconds, plain.seconds).as_data(),
            "flops_of_plain": sum(step.flops.values()) / sum(plain.flops.values()),
            "phases_ms": {
                phase: Samples(tuple(1e3 * value for value in seconds)).median for phase, seconds in step.phases.items()
            },
            "phases_flops": step.flops,
        }
        for name, step in steps.items()
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """Return a Markdown table of the steps: times as shares of the plain model, and phases in milliseconds."""
    phases = [
        name for name in ENCODE_PHASES if any(step["phases_ms"][name] >= 0.05 for step in result["steps"].values())
    ]
    head = ["step", "time, of plain", "FLOPs, of plain", *(f"{name}, ms" for name in phases)]
    rows = [head, ["---"] * len(head)]
    for name, step in result["steps"].items():
        share = step["of_plain"]
        low, high = share["interval"]
        time = "1" if name == "plain" else f"{share['median']:.3f} [{low:.3f}, {high:.3f}]"
        rows.append([name, time, f"{step['flops_of_plain']:.3f}", *(f"{step['phases_ms'][n]:,.1f}" for n in phases)])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    coverage = 100 * next(iter(result["steps"].values()))["of_plain"]["coverage"]
    environment_data = result["environment"]
    return (
        f"{result['model']['name']}, HiRED at {100 * result['budget']:g} %, {result['size']} pixels, "
        f"{result['repeats']} rounds in turns, medians, {coverage:.0f} % intervals; {environment_data['device_name']}, "
        f"{environment_data['threads']} threads, {result['model']['dtype']}, torch {environment_data['torch']}, "
        f"transformers {environment_data['transformers']}\n\n{table}\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = ArgumentParser(prog="python -m research.truncation_steps", description=__doc__)
    add = parser.add_argument
    add("--model", default="llava-v1.6-vicuna-7b", help="as in `tokenprune bench run`; its LLM is cut to one layer")
    add("--budget", type=float | str, default=0.2, help="budget of HiRED as a ratio: 0.2 or 20%")
    add("--size", type=str, default="672x672", help="height x width of the image in pixels")
    add("--repeats", type=int, default=7, help="number of timed rounds")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--dtype", default="auto", help="auto (float32 on a CPU), float32, bfloat16, float16")
    add("--threads", type=int, help="number of CPU threads of torch; by default, torch selects it")
    add("--out", type=str, help="path of the JSON file")
    config = parser.parse_args(argv)
    try:
        size, budget = parse_image_size(config.size, "--size"), parse_ratio(config.budget)
    except ValueError as error:
        parser.error(str(error))
    with torch_threads(config.threads or torch.get_num_threads()):
        model = load_bench_model(config.model, config.device, config.dtype, None, 1)
        if not isinstance(model.adapter, PlaceholderAdapter) or not model.adapter.projects_per_token:
            parser.error(
                f"--model {config.model}: images of {model.adapter.family} always pass the complete tower and projector"
            )
        steps = measure_steps(model, size, budget, config.repeats, lambda text: print(text, file=sys.stderr))
        result = {
            "model": model.as_data(),
            "environment": describe_environment(model.model.device),
            "budget": budget,
            "size": config.size,
            "repeats": config.repeats,
            "steps": as_data(steps),
        }
    if config.out:
        Path(config.out).write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
