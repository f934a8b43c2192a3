"""Reads the question of the user from a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

USER = r"\[INST\]|<\|im_start\|>\s*user|<\|start_header_id\|>\s*user\s*<\|end_header_id\|>|\b(?:user|human)\s*:"
ASSISTANT = (
    r"\[/INST\]|<\|im_start\|>\s*assistant|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>"
    r"|\b(?:assistant|gpt)\s*:"
)
TURN = re.compile(f"(?P<user>{USER})|(?P<assistant>{ASSISTANT})", re.IGNORECASE)
"""Turn marks of chat templates: LLaVA (Vicuna, Mistral), ChatML (Qwen) and Llama 3."""


def extract_question(prompt: str, special: Sequence[str]) -> str:
    """Return the question of the user: the last user turn with text, or all text if the prompt has no turns.

    Args:
        prompt: a decoded prompt.
        special: special tokens to remove, including the image placeholder.
    """
    marks = [*TURN.finditer(prompt)]
    turns = [prompt] if not marks else []
    for number, mark in enumerate(marks):
        end = marks[number + 1].start() if number + 1 < len(marks) else len(prompt)
        if mark["user"]:
            turns.append(prompt[mark.end() : end])
    texts = []
    for turn in turns:
        for token in sorted(special, key=len, reverse=True):
            turn = turn.replace(token, " ")
        texts.append(" ".join(turn.split()))
    return next((text for text in reversed(texts) if text), "")


class QuestionReader:
    """Decodes prompts and extracts their questions.

    Args:
        model: the model; its folder or hub id (`name_or_path`) has the tokenizer.
        image_token_id: id of the image placeholder.
    """

    def __init__(self, model: Any, image_token_id: int) -> None:
        self.name, self.image_token_id = getattr(model, "name_or_path", ""), image_token_id

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model.

        Raises:
            ValueError: if the model has no folder or hub id.
        """
        if not self.name:
            raise ValueError(
                "the question cannot be read from the prompt: the model was not loaded from a folder or hub id with a "
                "tokenizer. Attach with reducer(model, tokenizer=processor.tokenizer) or question=..."
            )
        return AutoTokenizer.from_pretrained(self.name)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None, tokenizer: Any = None) -> list[str]:
        """Return the question of the user in each prompt row.

        Args:
            input_ids: prompts, `[rows, length]`.
            attention_mask: real positions, `[rows, length]`; None means all positions.
            tokenizer: a tokenizer, or a processor with a tokenizer; None is the tokenizer of the model.

        Raises:
            ValueError: if no tokenizer is passed and the model has no folder or hub id.
        """
        tokenizer = self.tokenizer if tokenizer is None else getattr(tokenizer, "tokenizer", tokenizer)
        special = [*tokenizer.all_special_tokens, tokenizer.decode([self.image_token_id])]
        real = input_ids != self.image_token_id
        real = real if attention_mask is None else real & attention_mask.bool()
        prompts = [tokenizer.decode(ids[keep]) for ids, keep in zip(input_ids, real, strict=True)]
        return [extract_question(prompt, special) for prompt in prompts]
