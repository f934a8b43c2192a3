"""Profiles one call of the plain model, the release-like baseline and HiRED, up to the first token.

Run it: ``python -m research.gpu.profile_calls --device cuda --model llava-v1.6-vicuna-7b``

For each variant it writes the wall time, the time of the kernels, the counts of launches and waits, and the operators
with the longest own time on the host. If the kernels take much less time than the call, the GPU waits for its host.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from torch.profiler import ProfilerActivity, profile

from tokenprune.experiments.bench.bench_model import BenchModel, load_bench_model, parse_image_size, random_image
from tokenprune.experiments.bench.environment import describe_environment
from tokenprune.experiments.bench.launches import OPERATORS, OperatorCounter, count_events
from tokenprune.experiments.bench.measure import Variant, generate_once, list_variants
from tokenprune.strategies import HiRED

WARMUP = 3
"""Calls before the profiled call: they load kernels. The last of them gives the wall time."""


def profile_call(bench_model: BenchModel, inputs: Mapping[str, Any], variant: Variant) -> tuple[dict[str, Any], str]:
    """Profile one call of a variant, and return its numbers and the table of its operators.

    Args:
        bench_model: the model.
        inputs: its inputs.
        variant: the way to run the model.
    """
    seconds = [generate_once(bench_model, inputs, variant, 1, builds_tables=True)[0] for _ in range(WARMUP)]
    is_cuda = bench_model.model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    profiler, counter = profile(activities=activities), OperatorCounter()
    generate_once(bench_model, inputs, variant, 1, context=profiler, builds_tables=True)
    averages = profiler.key_averages()
    if is_cuda:
        launches = count_events((event.key, event.count) for event in averages)
    elif variant.is_compiled:
        launches = {}  # the counter of operators does not see inside graphs
    else:
        generate_once(bench_model, inputs, variant, 1, context=counter, builds_tables=True)
        launches = {OPERATORS: counter.number}
    result = {
        "wall_ms": 1e3 * seconds[-1],
        "kernel_ms": sum(event.self_device_time_total for event in averages) / 1e3 if is_cuda else None,
        "launches": launches,
    }
    return result, averages.table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    parser = ArgumentParser(prog="python -m research.gpu.profile_calls", description=__doc__)
    add = parser.add_argument
    add("--model", default="llava-v1.6-vicuna-7b", help="as in `tokenprune bench run`")
    add("--device", default="cuda", help="cuda, cpu, ...")
    add("--dtype", default="auto", help="auto (float32 on a CPU, otherwise bfloat16), float32, bfloat16, float16")
    add("--size", default="672x672", help="height x width of the images in pixels")
    add("--batches", type=int, nargs="+", default=[1, 8], help="prompts per batch, with one image each")
    add("--budget", type=float, default=0.2, help="budget of HiRED and of the baseline as a ratio")
    add("--compile", type=bool, default=False, help="also profile HiRED with compiled graphs")
    add("--out", default="gpu-results/profile", help="folder of profile.json and of one table of operators per call")
    config = parser.parse_args(argv)
    bench_model, folder = load_bench_model(config.model, config.device, config.dtype), Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    budget, size = config.budget, parse_image_size(config.size, "--size")
    variants = list_variants([(f"HiRED {100 * budget:g} %", HiRED(budget))], [budget], config.compile)
    calls = []
    for batch in config.batches:
        inputs = bench_model.prepare([random_image(size, seed) for seed in range(batch)])
        for variant in variants:
            numbers, table = profile_call(bench_model, inputs, variant)
            calls.append({"batch": batch, "variant": variant.name, **numbers})
            print(json.dumps(calls[-1]), flush=True)
            name = f"batch-{batch}-{variant.name}".replace(" ", "-").replace("%", "percent")
            (folder / f"{name}.txt").write_text(table + "\n")
    result = {"model": bench_model.as_data(), "environment": describe_environment(bench_model.model.device)}
    (folder / "profile.json").write_text(json.dumps(result | {"calls": calls}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
