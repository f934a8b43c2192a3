"""Counts the Python calls of one reduction with HiRED at 20 % on the embedded model: `docs/results/performance.md`.

Run it: ``python -m research.python_calls``

`cProfile` counts calls of functions of Python and C, so the numbers do not depend on the speed of the machine. They
depend on the versions of Python, torch and transformers. Each image has five tiles, and no pixels are kept for drawing.
"""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tokenprune
from tokenprune.display import format_count
from tokenprune.experiments.bench.bench_model import load_bench_model, random_image
from tokenprune.experiments.bench.selection_cost import torch_threads
from tokenprune.pipeline import Pipeline
from tokenprune.strategies import HiRED

BUDGET, SIZE = 0.2, (160, 160)
"""Budget of HiRED; height and width of the images in pixels, which give five tiles."""
WARMUP = 10
"""Calls before the counted call."""
ARGUMENTS = ("pixel_values", "image_sizes")
"""Inputs of the model that `get_image_features` receives."""
PACKAGE = str(Path(tokenprune.__file__).parent)


def count_calls(function: Callable[..., object], *args: Any, **kwargs: Any) -> Counter[tuple[str, str]]:
    """Return the numbers of calls inside one call of a function, by file and name of the called function.

    Args:
        function: the function, which is called several times before.
        args: its arguments.
        kwargs: its keyword arguments.
    """

    def run() -> None:
        function(*args, **kwargs)

    for _ in range(WARMUP):
        run()
    profiler = cProfile.Profile()
    profiler.runcall(run)
    counts: Counter[tuple[str, str]] = Counter()
    stats: Mapping[tuple[str, int, str], Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    for (file, _, name), (_, number, *_) in stats.items():
        counts[file, name] += number
    return counts


@torch.inference_mode()
def main(images: Sequence[int] = (1, 8), most_frequent: int = 10) -> None:
    """Print the numbers of calls as tables.

    Args:
        images: numbers of prompts, with one image each.
        most_frequent: number of functions with the most calls to print.
    """
    with torch_threads(1):
        bench_model, frequent = load_bench_model("mini", "cpu"), []
        print("| images | calls | of which in tokenprune | plain `get_image_features` |\n|---|---|---|---|")
        for number in images:
            inputs = bench_model.prepare([random_image(SIZE, seed) for seed in range(number)])
            pipeline = Pipeline(HiRED(BUDGET), bench_model.adapter, keep_pixels=False)
            arguments = {name: inputs[name] for name in ARGUMENTS}
            plain = count_calls(bench_model.model.base_model.get_image_features, **arguments).total()
            counts = count_calls(pipeline.prepare, inputs)
            own = sum(calls for (file, _), calls in counts.items() if file.startswith(PACKAGE))
            print(f"| {number} | {counts.total():,} | {own:,} | {plain:,} |")
            names = (f"{name} ({Path(file).name}) {calls}" for (file, name), calls in counts.most_common(most_frequent))
            frequent.append(f"{format_count(number, 'image')}: {', '.join(names)}")
        print("\nMost frequent calls:", *frequent, sep="\n")


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
