"""Compares strategies inside the vision tower, alone and composed with HiRED, at equal FLOPs of tower and LLM.

Run it: ``python -m research.tower_reduction accuracy`` on held-out boards with the embedded model, and ``python -m
research.tower_reduction speed`` on CLIP ViT-L/14 at 336 pixels with random weights and five tiles.

FLOPs of the tower are counted by torch under eager attention. FLOPs of the LLM are those of the account of a run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from research.heldout import Answers, board_interval, measure_board
from research.mini_training.evaluate import build_inputs
from tokenprune.account import prefill_flops
from tokenprune.adapter import find_adapter
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.experiments.bench.tower_flops import count_tower_flops
from tokenprune.models import mini
from tokenprune.models.mini.boards import boards
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import HiRED
from tokenprune.strategies.encoder import EViT, PiToMe, RandomPatches, ToMe

BUDGETS = (0.05, 0.1, 0.2, 0.4)
"""Budgets of HiRED alone; their FLOPs are the targets of the compositions."""
TOWER: Mapping[str, EncoderReducer] = {
    "ToMe(r=4)": ToMe(r=4),
    "ToMe(r=8)": ToMe(r=8),
    "ToMe(r=12)": ToMe(r=12),
    "ToMe(r=8, proportional=False)": ToMe(r=8, proportional=False),
    "PiToMe(r=8)": PiToMe(r=8),
    "EViT": EViT(),
    "RandomPatches(0.5)": RandomPatches(0.5),
}
"""The compared strategies inside the tower."""
SCHEDULES: Mapping[str, EncoderReducer] = {
    "ToMe(r=8)": ToMe(r=8),
    "ToMe(r=16)": ToMe(r=16),
    "ToMe(0.2)": ToMe(0.2),
    "PiToMe(r=16)": PiToMe(r=16),
    "EViT": EViT(),
    "RandomPatches(0.5)": RandomPatches(0.5),
}
"""The strategies of the speed table; the depth of ViT-L/14 allows more steps."""


def count_encode_flops(adapter: Any, inputs: Mapping[str, Any], reducer: EncoderReducer | None) -> int:
    """Return the FLOPs of the tower in an encoding up to the feature layer, without the projector.

    Args:
        adapter: the adapter of a model with eager attention.
        inputs: the vision inputs of a call.
        reducer: the strategy inside the tower; None runs the tower on all patches.
    """
    reducers = [] if reducer is None else [reducer]
    return count_tower_flops(adapter, lambda: adapter.encode(inputs, (), truncated=True, patch_reducers=reducers))


def find_budget(target: float, tower: int, flops_of: Callable[[int], float], tokens: int) -> float:
    """Return the largest budget with which tower and LLM need at most the target FLOPs, between 1 token and all.

    Args:
        target: FLOPs of tower and LLM.
        tower: FLOPs of the tower.
        flops_of: maps a number of visual tokens to FLOPs of the LLM.
        tokens: number of visual tokens without reduction.
    """
    fitting = [number for number in range(1, tokens + 1) if tower + flops_of(number) <= target]
    return max(fitting, default=1) / tokens


def measure_accuracy(number: int, first: int) -> dict[str, Any]:
    """Return right answers and GFLOPs of tower and LLM of every setting for each board.

    Args:
        number: number of boards.
        first: index of the first board.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()
    model.set_attn_implementation("eager")
    processor, adapter = AutoProcessor.from_pretrained(mini.path()), find_adapter(model)
    right: dict[str, list[list[int]]] = {}
    flops: dict[str, list[float]] = {}
    for board in boards(number, "heldout", first):
        inputs = build_inputs(processor, board.image, [board.questions[0].text])
        count = partial(count_encode_flops, adapter, inputs)
        tower = {"": count(None)} | {name: count(reducer) for name, reducer in TOWER.items()}
        tokens = adapter.layouts(inputs)[0].tiles * adapter.layouts(inputs)[0].tokens
        text = inputs["input_ids"].shape[1] - len(adapter.layouts(inputs)[0].packed)

        def llm_flops(visual: int, text: int = text) -> float:
            return prefill_flops(adapter.llm, visual + text)

        settings: dict[str, tuple[str, TokenReducer]] = {"full": ("", HiRED(1.0))}
        settings |= {name: (name, reducer) for name, reducer in TOWER.items()}
        for budget in BUDGETS:
            settings[f"{budget} HiRED"] = ("", HiRED(budget))
            target = tower[""] + llm_flops(int(budget * tokens))
            for name, reducer in TOWER.items():
                share = find_budget(target, tower[name], llm_flops, tokens)
                settings[f"{budget} {name}+HiRED"] = (name, reducer >> HiRED(share))
        rows = [(key, 0.0, reducer) for key, (_, reducer) in settings.items()]
        for key, _, answers, run in measure_board(model, processor, board, rows):
            prompts = run.account.row_count
            right.setdefault(key, []).append([int(is_right) for is_right in answers])
            total = tower[settings[key][0]] + run.account.flops / prompts
            flops.setdefault(key, []).append(total / 1e9)
    return {"right": right, "gflops": flops}


def format_accuracy(results: Mapping[str, Any]) -> str:
    """Return the Markdown tables of accuracy in percent with 95 % intervals.

    Args:
        results: the result of `measure_accuracy`.
    """
    right, flops = results["right"], results["gflops"]

    def cell(key: str) -> str:
        answers: list[Answers] = [np.array(row) for row in right[key]]
        mean, low, high = board_interval(answers)
        return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}], {np.mean(flops[key]):.3f}"

    questions = sum(map(len, right["full"]))
    lines = [
        f"{len(right['full'])} held-out boards, {questions} questions. Right answers in percent, 95 % intervals from "
        "a bootstrap over boards, and GFLOPs of tower and prefill per prompt.",
        "\n| strategy | alone |\n|---|---|",
        f"| all tokens | {cell('full')} |",
        *(f"| {name} | {cell(name)} |" for name in TOWER),
        "\nAt the FLOPs of HiRED alone with each budget:\n",
        f"| strategy | {' | '.join(f'{budget:.0%}' for budget in BUDGETS)} |",
        "|---|" + "---|" * len(BUDGETS),
    ]
    for name in ("HiRED", *(f"{name}+HiRED" for name in TOWER)):
        lines.append(f"| {name} | {' | '.join(cell(f'{budget} {name}') for budget in BUDGETS)} |")
    return "\n".join(lines)


def accuracy(number: int = 30, first: int = 1000, out: str | None = None) -> None:
    """Measure all settings on held-out boards and print the tables.

    Args:
        number: number of boards; each has about 18 questions.
        first: index of the first board.
        out: JSON file for the answers to all questions.
    """
    results = measure_accuracy(number, first)
    if out is not None:
        Path(out).write_text(json.dumps(results))
    print(format_accuracy(results))


def build_large_model() -> Any:
    """Return LLaVA-NeXT with CLIP ViT-L/14 at 336 pixels and a tiny LLM, random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    grids = [[336, 672], [672, 336], [672, 672]]
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=99, image_grid_pinpoints=grids)
    torch.manual_seed(0)
    return LlavaNextForConditionalGeneration(config).eval()


def speed(repeats: int = 3, out: str | None = None) -> None:
    """Print FLOPs and CPU time of the tower with each strategy, absolute and as a ratio to all patches.

    Variants run in turns on one thread; the time is the minimum of the CPU time of the process.

    Args:
        repeats: number of runs of each variant.
        out: JSON file for the numbers.
    """
    torch.set_num_threads(1)
    model = build_large_model()
    adapter = find_adapter(model)
    inputs = {"pixel_values": torch.randn(1, 5, 3, 336, 336), "image_sizes": torch.tensor([[672, 672]])}
    variants: dict[str, EncoderReducer | None] = {"all patches": None, **SCHEDULES}
    times = {name: float("inf") for name in variants}
    for _ in range(repeats):
        for name, reducer in variants.items():
            start = time.process_time()
            with torch.no_grad():
                adapter.encode(inputs, (), truncated=True, patch_reducers=[] if reducer is None else [reducer])
            times[name] = min(times[name], time.process_time() - start)
    model.set_attn_implementation("eager")
    flops = {name: count_encode_flops(adapter, inputs, reducer) for name, reducer in variants.items()}
    rows = {
        name: {
            "patches": 576 if reducer is None else min(reducer.list_steps(576, 23).values()),
            "tflops": flops[name] / 1e12,
            "flops_ratio": flops[name] / flops["all patches"],
            "seconds": times[name],
            "time_ratio": times[name] / times["all patches"],
        }
        for name, reducer in variants.items()
    }
    if out is not None:
        Path(out).write_text(json.dumps(rows, indent=1))
    print("| strategy | patches of a tile at the end | TFLOPs | of all | CPU seconds | of all |\n" + "|---" * 6 + "|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['patches']} | {row['tflops']:.2f} | {row['flops_ratio']:.1%} | {row['seconds']:.1f} | "
            f"{row['time_ratio']:.1%} |"
        )


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli({"accuracy": accuracy, "speed": speed}, as_positional=False)
