"""A tiny CLIP checkpoint with random weights, from which the text tower of an example is loaded."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

from tokenprune.models._base.clip_text import without_progress_bars


def build_text_model(width: int) -> str:
    """Return the folder of a tiny CLIP checkpoint with fixed random weights; it is deleted when the process ends.

    Args:
        width: width of its vision tower.
    """
    return _build_folder(width).name


@cache
def _build_folder(width: int) -> TemporaryDirectory[str]:
    folder = TemporaryDirectory(prefix="tokenprune-")
    words = ["<unk>", "<s>", "what", "is", "in", "the", "image", "</s>"]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    shared: Any = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    shared["num_attention_heads"] = 1
    text = CLIPTextConfig(
        vocab_size=len(words), bos_token_id=1, eos_token_id=len(words) - 1, max_position_embeddings=12, **shared
    )
    vision = CLIPVisionConfig(**shared)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    with torch.random.fork_rng(), without_progress_bars():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder.name)
    tokenizer.save_pretrained(folder.name)
    return folder
