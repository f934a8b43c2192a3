"""Measures FLOPs and CPU time of a prefill with a cut inside an LLM of 8 layers and width 1,024.

Run it: ``python -m research.decoder_speed``

The model is LLaVA-1.5 with random weights, a tiny vision tower, and 576 visual tokens. Variants run in turns on one
thread; the time is the minimum of the CPU time of the process. FLOPs are counted by torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tokenprune.strategies import FastV

VISUAL, TEXT = 576, 60
IMAGE_TOKEN = 99


def build_model() -> LlavaForConditionalGeneration:
    """Return the model with random weights and eager attention, which torch's FLOP counter counts."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return model


def main(repeats: int = 7) -> None:
    """Print FLOPs and CPU time of each variant, absolute and as a ratio to the unmodified model.

    Args:
        repeats: number of runs of each variant, in turns.
    """
    torch.set_num_threads(1)
    model = build_model()
    ids = torch.cat([torch.full((1, VISUAL), IMAGE_TOKEN), torch.arange(1, TEXT + 1)[None]], dim=1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}

    def run_plain() -> None:
        model(**inputs)

    def run_reduced(budget: float) -> Callable[[], None]:
        reducer = FastV(layer=2, budget=budget)

        def run() -> None:
            with reducer(model):
                model(**inputs)

        return run

    variants = {"unmodified": run_plain, "FastV, 50 %": run_reduced(0.5), "FastV, 10 %": run_reduced(0.1)}
    flops, times = {}, {name: float("inf") for name in variants}
    with torch.no_grad():
        for name, run in variants.items():
            with FlopCounterMode(display=False) as counter:
                run()
            flops[name] = counter.get_total_flops()
        for _ in range(repeats):
            for name, run in variants.items():
                began = time.process_time()
                run()
                times[name] = min(times[name], time.process_time() - began)
    print("| variant | GFLOPs | of full | CPU seconds | of full |\n|---|---|---|---|---|")
    for name in variants:
        full_flops, full_time = flops["unmodified"], times["unmodified"]
        print(
            f"| {name} | {flops[name] / 1e9:.1f} | {flops[name] / full_flops:.1%} | {times[name]:.2f} | "
            f"{times[name] / full_time:.1%} |"
        )


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
