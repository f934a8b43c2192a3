"""Builds the miniature model: configuration, tokenizer, processor and the checkpoint folder."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from tokenprune.models.mini import pages
from tokenprune.models.mini.boards import GRIDS, TILE, all_words, make_demo

__all__ = ["PATCH", "SIDE", "export", "make_config", "make_processor", "make_tokenizer", "write_demo"]

PATCH = 8
"""Side of a patch in pixels."""
SIDE = TILE // PATCH
"""Number of patches along the side of a tile."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %} "
    "ASSISTANT: {% endif %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def make_tokenizer(more_words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer. A number becomes one token per digit (``47`` -> ``4 ##7``).

    Args:
        more_words: Words after the words of boards; they do not change the ids of words of boards.

    Returns:
        The tokenizer with a chat template; it adds ``<s>`` at the start.
    """
    digits = [str(digit) for digit in range(10)]
    entries = [*_SPECIAL, *digits, *(f"##{digit}" for digit in digits), *all_words(), *more_words]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(entries))}
    core: Any = Tokenizer(WordPiece(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def make_config(
    tokenizer: PreTrainedTokenizerFast, grids: Sequence[tuple[int, int]] = GRIDS, head_dim: int = 32
) -> LlavaNextConfig:
    """Build the configuration: a five-layer CLIP tower with features of its fourth layer, and a three-layer Llama.

    The base of the rotary frequencies grows with `head_dim`: larger heads have the same frequencies and lower ones.

    Args:
        tokenizer: The tokenizer.
        grids: Tile grids as (rows, columns).
        head_dim: Dimensions of an attention head of the Llama.
    """
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        projection_dim=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=8 * -(-len(tokenizer) // 8),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0 ** (head_dim / 32)},
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_grid_pinpoints=[[rows * TILE, columns * TILE] for rows, columns in grids],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, grids: Sequence[tuple[int, int]] = GRIDS) -> LlavaNextProcessor:
    """Build the processor that matches `make_config` with the same arguments."""
    images = LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[rows * TILE, columns * TILE] for rows, columns in grids],
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    # The additional token is the CLS token of the tower. Without it, the number of placeholders is too small by one.
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def export(
    model: LlavaNextForConditionalGeneration,
    folder: Path,
    more_words: Sequence[str] = (),
    grids: Sequence[tuple[int, int]] = GRIDS,
) -> None:
    """Write a checkpoint folder of transformers in half precision, and replace an existing folder by renaming.

    Args:
        model: The model in float32; it is not changed.
        folder: Path of the checkpoint folder.
        more_words: Words of the tokenizer after the words of boards.
        grids: Tile grids as (rows, columns).
    """
    new_folder, old_folder = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new_folder, ignore_errors=True)
    shutil.rmtree(old_folder, ignore_errors=True)
    tokenizer = make_tokenizer(more_words)
    half_model: Any = LlavaNextForConditionalGeneration(model.config)
    half_model.load_state_dict(model.state_dict())
    half_model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=8,
        do_sample=False,
    )
    half_model.to(torch.float16).save_pretrained(new_folder)
    make_processor(tokenizer, grids).save_pretrained(new_folder)
    # The files use half precision for size. The model loads in single precision, because half is slow on a CPU.
    settings = json.loads((new_folder / "config.json").read_text())
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part["dtype"] = "float32"
    (new_folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in new_folder.iterdir():
        file.chmod(0o644)
    AutoTokenizer.from_pretrained(new_folder)  # an unreadable folder must not replace an existing folder
    if folder.exists():
        folder.rename(old_folder)
    new_folder.rename(folder)
    shutil.rmtree(old_folder, ignore_errors=True)


def write_demo(folder: Path) -> None:
    """Write the demo images and their questions.

    Args:
        folder: The folder of the images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, example in (("page", pages.make_demo()), ("board", make_demo())):
        example.image.save(folder / f"{name}.png")
        questions = [
            {"question": question.text, "answer": question.answer, "type": question.type, "needs": question.needs}
            for question in example.questions
        ]
        (folder / f"{name}.json").write_text(json.dumps(questions, indent=1) + "\n")
