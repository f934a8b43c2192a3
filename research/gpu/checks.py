"""Checks on a GPU: identity at 100 %, and equal tokens under every attention kernel.

Run it: ``python -m research.gpu.checks --device cuda --model llava-v1.6-vicuna-7b --llm-layers 2``

Attention kernels round differently, so two kernels can keep different tokens whose scores are nearly equal. The numbers
of kept tokens must be equal. The share of common tokens must reach a limit that depends on the dtype.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenprune.experiments.bench.bench_model import BenchModel, load_bench_model, parse_image_size, random_image
from tokenprune.experiments.bench.environment import describe_environment
from tokenprune.experiments.bench.release_like import as_supported, eager_attention
from tokenprune.pipeline import Pipeline
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import DivPrune, FasterVLM, HiRED, VisionZip

STRATEGIES: tuple[type[TokenReducer], ...] = (HiRED, FasterVLM, VisionZip, DivPrune)
BACKENDS: Mapping[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels of scaled dot product attention by name."""
EAGER = "eager"
"""Name of the eager attention of transformers, the reference of the comparison."""
MINIMUM_SHARE = {torch.float32: 0.995, torch.bfloat16: 0.97, torch.float16: 0.97}
"""Smallest share of common tokens that counts as equal, by dtype. An H100 in bfloat16 had 0.988 to 0.997."""


def compare_with_plain(model: Any, inputs: Mapping[str, Any]) -> dict[str, bool]:
    """Return whether logits repeat bit for bit: in a second plain call, and with each strategy at 100 %.

    Args:
        model: the model.
        inputs: its inputs.
    """
    with torch.inference_mode():
        expected = model(**inputs).logits
        results = {"plain": torch.equal(model(**inputs).logits, expected)}
        for strategy in STRATEGIES:
            with strategy(1.0)(model):
                results[f"{strategy.__name__} 100 %"] = torch.equal(model(**inputs).logits, expected)
    return results


@contextmanager
def use_kernel(bench_model: BenchModel, name: str) -> Iterator[None]:
    """Run the attention of the vision tower with one kernel inside the block.

    Args:
        bench_model: the model.
        name: `EAGER` or a key of `BACKENDS`.
    """
    kernel = eager_attention(as_supported(bench_model.adapter).tower) if name == EAGER else sdpa_kernel(BACKENDS[name])
    with kernel:
        yield


def list_kept_tokens(
    bench_model: BenchModel, inputs: Mapping[str, Any], budget: float
) -> tuple[dict[str, list[Tensor]], dict[str, str]]:
    """Return the mask of kept tokens of each image by kernel, and the errors of kernels that cannot run.

    Only images are encoded, so that no mask of the LLM excludes a kernel.

    Args:
        bench_model: the model.
        inputs: its inputs.
        budget: budget of HiRED as a ratio.
    """
    masks, errors = {}, {}
    for name in (EAGER, *BACKENDS):
        pipeline = Pipeline(HiRED(budget), bench_model.adapter, keep_pixels=False)
        try:
            with torch.inference_mode(), use_kernel(bench_model, name):
                masks[name] = [selection.kept.cpu() for selection in pipeline.prepare(inputs).selections]
        except RuntimeError as error:
            errors[name] = str(error).partition("\n")[0]
    return masks, errors


def compare_kernels(masks: Mapping[str, Sequence[Tensor]], minimum_share: float) -> dict[str, dict[str, Any]]:
    """Return the numbers of kept tokens, the shares of tokens in common with `EAGER`, and the verdict, by kernel.

    Args:
        masks: mask of kept tokens of each image by kernel, bool `[tiles, tokens]`.
        minimum_share: smallest share of common tokens that counts as equal.
    """
    results = {}
    for name, kept in masks.items():
        numbers = [int(mask.sum()) for mask in kept]
        expected = [int(mask.sum()) for mask in masks[EAGER]]
        common = [int((mask & reference).sum()) for mask, reference in zip(kept, masks[EAGER], strict=True)]
        shares = [number / max(1, total) for number, total in zip(common, expected, strict=True)]
        passed = numbers == expected and min(shares) >= minimum_share
        results[name] = {"kept": numbers, "common_share": shares, "passed": passed}
    return results


def run_checks(bench_model: BenchModel, size: tuple[int, int], budget: float) -> dict[str, Any]:
    """Run all checks on two images, and return their results as plain data.

    Args:
        bench_model: the model.
        size: height x width of the images in pixels.
        budget: budget of HiRED for the comparison of kernels.
    """
    inputs = bench_model.prepare([random_image(size, seed) for seed in range(2)])
    model, minimum_share = bench_model.model, MINIMUM_SHARE[bench_model.model.dtype]
    identity = compare_with_plain(model, inputs)
    masks, errors = list_kept_tokens(bench_model, inputs, budget)
    kernels = compare_kernels(masks, minimum_share)
    return {
        "model": bench_model.as_data(),
        "environment": describe_environment(model.device),
        "size": size,
        "budget": budget,
        "identical_logits": identity,
        "minimum_share": minimum_share,
        "kernels": kernels,
        "unavailable_kernels": errors,
        "passed": all(identity.values()) and all(kernel["passed"] for kernel in kernels.values()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code: 1 if a check failed, otherwise 0."""
    parser = ArgumentParser(prog="python -m research.gpu.checks", description=__doc__)
    add = parser.add_argument
    add("--model", default="llava-v1.6-vicuna-7b", help="as in `tokenprune bench run`")
    add("--device", default="cuda", help="cuda, cpu, ...")
    add("--dtype", default="auto", help="auto (float32 on a CPU, otherwise bfloat16), float32, bfloat16, float16")
    add("--llm-layers", type=int, default=2, help="number of LLM layers to keep")
    add("--size", default="672x672", help="height x width of the images in pixels")
    add("--budget", type=float, default=0.2, help="budget of HiRED for the comparison of kernels")
    add("--out", type=str, help="path of the JSON file")
    config = parser.parse_args(argv)
    bench_model = load_bench_model(config.model, config.device, config.dtype, None, config.llm_layers)
    result = run_checks(bench_model, parse_image_size(config.size, "--size"), config.budget)
    text = json.dumps(result, indent=1)
    print(text)
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(text + "\n")
    return int(not result["passed"])


if __name__ == "__main__":
    sys.exit(main())
