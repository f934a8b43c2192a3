"""The CLIP model of the text tower: its tokenizer, its embeddings, and its checkpoint folder."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    PreTrainedTokenizerFast,
)

from research.mini_training.build import make_tokenizer

MAX_TOKENS = 32
"""Number of positions of the text tower."""
_END = "<|endoftext|>"


def make_text_tokenizer(more_words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Build the tokenizer of the text tower: the tokenizer of the model with an end token as in CLIP.

    The words keep their ids. The end token is new and has the highest id. `transformers` finds the end by its id. For
    id 2, which is the end token of the model, it uses the highest id of the sentence instead. The highest id is correct
    in both cases.

    Args:
        more_words: Words of the tokenizer of the model after the words of boards.

    Returns:
        The tokenizer. It adds ``<s>`` at the start and the end token at the end, pads on the right, and truncates to
        `MAX_TOKENS`.
    """
    core = json.loads(make_tokenizer(more_words).backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    vocabulary[_END] = len(vocabulary)
    raw: Any = Tokenizer.from_str(json.dumps(core))
    raw.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {_END}",
        special_tokens=[("<s>", vocabulary["<s>"]), (_END, vocabulary[_END])],
    )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=_END,
        unk_token="<unk>",
        padding_side="right",
        model_max_length=MAX_TOKENS,
    )
    return tokenizer


def make_text_model(tower: Any, more_words: Sequence[str] = ()) -> CLIPModel:
    """Build an untrained CLIP model with the vision tower of the checkpoint.

    Args:
        tower: The vision tower; its weights are copied.
        more_words: Words of the tokenizer of the model after the words of boards.

    Returns:
        The model. Only the parameters that `train_text` trains require gradients.
    """
    tokenizer = make_text_tokenizer(more_words)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        projection_dim=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=tower.config.to_dict(), projection_dim=64)
    model: Any = CLIPModel(config)
    model.vision_model.load_state_dict(tower.state_dict())
    model.vision_model.requires_grad_(False)
    model.vision_model.post_layernorm.requires_grad_(True)
    return model


def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the normalized embeddings of sentences, `[texts, dims]`."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    pooled = model.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def embed_features(model: Any, features: Tensor) -> Tensor:
    """Return the normalized embeddings of CLS or patch features in the space of the sentences, `[..., dims]`."""
    return F.normalize(model.visual_projection(model.vision_model.post_layernorm(features)), dim=-1)


def export_text(model: Any, folder: Path, more_words: Sequence[str] = ()) -> None:
    """Write a CLIP checkpoint folder of transformers in half precision.

    Args:
        model: The model in float32; it is not changed.
        folder: Path of the folder; an existing folder is replaced.
        more_words: Words of the tokenizer of the model after the words of boards.
    """
    shutil.rmtree(folder, ignore_errors=True)
    half_model: Any = CLIPModel(model.config)
    half_model.load_state_dict(model.state_dict())
    half_model.to(torch.float16).save_pretrained(folder)
    make_text_tokenizer(more_words).save_pretrained(folder)
    # The files use half precision for size. The model loads in single precision, because half is slow on a CPU.
    settings = json.loads((folder / "config.json").read_text())
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
