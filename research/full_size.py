"""Runs an image through LLaVA-NeXT with its full-size vision tower, random weights and few LLM layers.

Run it: ``python -m research.full_size --image IMAGE``

The result does not depend on the weights. The run checks layouts, budgets, capturing and rewriting at ViT-L/14-336 with
576 tokens per tile, up to 2,880 visual tokens and the hidden width of a 7B model. It requires about 4 GB of memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from tokenprune.image_files import load_image
from tokenprune.models import mini
from tokenprune.strategies import HiRED


def build_model(llm_layers: int) -> tuple[Any, Any]:
    """Return a LLaVA-NeXT-7B with random weights and ``llm_layers`` decoder layers, and the processor."""
    tokenizer: Any = AutoTokenizer.from_pretrained(mini.path())
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=llm_layers,
            num_attention_heads=32,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor


def main(image: str, budget: float = 0.2, llm_layers: int = 2, out: str | None = None) -> None:
    """Run an image through the full and the reduced model, and print the numbers of tokens.

    Args:
        image: path of the image.
        budget: budget of HiRED as a ratio.
        llm_layers: number of decoder layers; the original 7B model has 32.
        out: path of the image of the overlay; by default, no overlay is written.
    """
    model, processor = build_model(llm_layers)
    inputs = processor(images=[load_image(image)], text=["<image> what number"], return_tensors="pt")
    with torch.inference_mode():
        full = model(**inputs, logits_to_keep=1).logits
        with HiRED(1.0)(model):
            is_identical = torch.equal(full, model(**inputs, logits_to_keep=1).logits)
        with HiRED(budget)(model) as run:
            model(**inputs, logits_to_keep=1)
    entry, (before, after) = run.account.images[0], run.account.prompt_lengths[0]
    layout = run.selections[0].geometry
    print(f"image {tuple(inputs['image_sizes'][0].tolist())}, tile grid {layout.tile_grid}, {llm_layers} LLM layers")
    print(
        f"visual tokens: {entry.encoded} encoded, {entry.valid} valid and {entry.newlines_full} newlines in the prompt"
    )
    print(f"asked {entry.asked}, kept {entry.kept} {list(entry.kept_per_tile)} and {entry.newlines} newlines")
    print(f"prompt: {before} -> {after}; {run.account}")
    print(f"at 100 % the logits are bit-identical: {is_identical}")
    if out is not None:
        run.selections[0].overlay().save(Path(out))
        print(f"overlay: {out}")


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
