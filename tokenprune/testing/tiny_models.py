"""Tiny LLaVA-1.5 and LLaVA-NeXT models with random weights, their processors, a tokenizer, and random images."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

TILE, PATCH = 56, 14
PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168], [168, 56]]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SENTENCES = [
    "USER: what is in the image? ASSISTANT: a red star on a board.",
    "the number in the star is forty two",
    "how many shapes are there in the image and where are they",
    "describe the image in one word please",
    "which shape is left of the blue circle",
    "a document with many small letters",
]


@cache
def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on a few sentences.

    Args:
        special: special tokens by attribute name; by default only the image placeholder.
    """
    special = special or {"image_token": "<image>"}
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = list(dict.fromkeys(["<pad>", "<s>", "</s>", *special.values()]))
    trainer = BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(SENTENCES, trainer)
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=special,
    )
    fast_tokenizer.chat_template = TEMPLATE
    return fast_tokenizer


def _text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _vision_config(tower: str) -> Any:
    config_class: Any = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    return config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
    )


def _scale_weights(model: Any) -> Any:
    """Scale the query and key weights of the tower, so that attention is far from uniform, and randomize biases."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif ("q_proj" in name or "k_proj" in name) and "vision_tower" in name:
                parameter.mul_(12.0)
    return model.eval()


def tiny_model(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, tower: str = "clip") -> Any:
    """Return a new tiny model with deterministic random weights.

    Args:
        family: ``"llava"`` or ``"llava_next"``.
        attn: name of the attention kernel.
        dtype: the dtype of the weights.
        tower: ``"clip"`` or ``"siglip"`` (no CLS token).
    """
    torch.manual_seed(0)
    common = {
        "vision_config": _vision_config(tower),
        "text_config": _text_config(),
        "image_token_index": tokenizer().convert_tokens_to_ids("<image>"),
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "vision_feature_layer": -2,
    }
    if family == "llava_next":
        config: Any = LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS)
        model: Any = LlavaNextForConditionalGeneration
    else:
        config = LlavaConfig(**common, image_seq_length=(TILE // PATCH) ** 2)
        model = LlavaForConditionalGeneration
    config._attn_implementation = attn
    model = _scale_weights(model._from_config(config, attn_implementation=attn))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    return model.to(dtype)


def tiny_processor(family: str, tower: str = "clip") -> Any:
    """Return the processor of a tiny model.

    Args:
        family: ``"llava"`` or ``"llava_next"``.
        tower: ``"clip"`` or ``"siglip"``.
    """
    shared = {
        "tokenizer": tokenizer(),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "num_additional_image_tokens": 1 if tower == "clip" else 0,
        "chat_template": TEMPLATE,
    }
    square = {"height": TILE, "width": TILE}
    if family == "llava_next":
        images: Any = LlavaNextImageProcessor(
            size={"shortest_edge": TILE}, crop_size=square, image_grid_pinpoints=PINPOINTS
        )
        return LlavaNextProcessor(image_processor=images, **shared)
    images = CLIPImageProcessor(size={"shortest_edge": TILE}, crop_size=square)
    return LlavaProcessor(image_processor=images, **shared)


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return an RGB image of smooth random blobs.

    Args:
        height: height in pixels.
        width: width in pixels.
        seed: seed of the colors.
    """
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def batch(family: str, *rows: list[tuple[int, int]], tower: str = "clip", side: str = "left", seed: int = 0) -> Any:
    """Return the model inputs of a batch of prompts with random images.

    Args:
        family: ``"llava"`` or ``"llava_next"``.
        rows: for each prompt row, height x width in pixels of its images.
        tower: ``"clip"`` or ``"siglip"``.
        side: the padding side.
        seed: seed of the images.
    """
    processor = tiny_processor(family, tower)
    texts, images = [], []
    for number, sizes in enumerate(rows):
        texts.append("USER: " + "<image> " * len(sizes) + SENTENCES[1 + number % 4] + " ASSISTANT:")
        images += [random_image(*size, seed=seed + 10 * number + k) for k, size in enumerate(sizes)]
    return processor(images=images or None, text=texts, return_tensors="pt", padding=True, padding_side=side)
