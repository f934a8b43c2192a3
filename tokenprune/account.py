"""What was asked, what was kept, and what it saves in the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenprune.adapter import LLMShape
from tokenprune.selection import Selection


def kv_bytes(shape: LLMShape, length: int) -> int:
    """Return the bytes of the key-value cache of a prompt.

    Args:
        shape: the decoder.
        length: tokens in the prompt.
    """
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.element_bytes * length


def prefill_flops(shape: LLMShape, length: int) -> int:
    """Return the FLOPs of a prefill that yields one next token, as torch counts them under eager attention.

    A multiply-add is two FLOPs. All linear maps are counted as the model has them (a gated MLP has three), attention as
    the full square. Norms, activations and softmax are left out. The widespread ``4nd^2 + 2n^2d + 2ndm`` per layer
    counts multiply-adds and a two-matrix MLP: less than half of this for LLaMA.

    Args:
        shape: the decoder.
        length: tokens in the prompt.
    """
    attention = 4 * shape.layers * shape.heads * shape.head_dim * length * length
    return 2 * shape.linear_parameters * length + attention + 2 * shape.head_parameters


@dataclass(frozen=True)
class ImageAccount:
    """The tokens of one image.

    Args:
        asked: tokens that the budget granted.
        kept: visual tokens that entered the LLM, newlines not counted.
        valid: visual tokens that would have entered without reduction.
        encoded: tokens that the vision tower put out, padding included.
        newlines: newline tokens that entered.
        newlines_full: newline tokens that would have entered.
        granted_per_tile: tokens granted to each tile, base tile first.
        kept_per_tile: tokens kept of each tile, base tile first.
    """

    asked: int
    kept: int
    valid: int
    encoded: int
    newlines: int
    newlines_full: int
    granted_per_tile: tuple[int, ...]
    kept_per_tile: tuple[int, ...]

    @classmethod
    def of(cls, selection: Selection) -> ImageAccount:
        """Return the account of one selection."""
        geometry = selection.geometry
        return cls(
            asked=selection.asked,
            kept=selection.kept_tokens,
            valid=int(geometry.valid.sum()),
            encoded=geometry.tiles * geometry.tokens,
            newlines=selection.kept_separators,
            newlines_full=geometry.separators,
            granted_per_tile=tuple(selection.granted_per_tile),
            kept_per_tile=tuple(selection.kept_per_tile),
        )


@dataclass
class TokenAccount:
    """Tokens, cache bytes and FLOPs of everything that a run has seen.

    Args:
        llm: the shape of the language model.
        images: one entry per image, in the order seen.
        prompt_lengths: tokens of each prompt row as (full, reduced), padding not counted.
        attention: where the attention came from that the strategy read; None if it read none.
        second_look_flops: FLOPs of the second model that looked at the pictures, if there was one.
    """

    llm: LLMShape
    images: list[ImageAccount] = field(default_factory=list)
    prompt_lengths: list[tuple[int, int]] = field(default_factory=list)
    attention: str | None = None
    second_look_flops: int = 0

    def add(self, selections: Sequence[Selection], prompt_lengths: Sequence[tuple[int, int]]) -> None:
        """Enter the images and prompt rows of one call."""
        self.images += [ImageAccount.of(selection) for selection in selections]
        self.prompt_lengths += prompt_lengths

    @property
    def asked(self) -> int:
        """Tokens granted to all images."""
        return sum(image.asked for image in self.images)

    @property
    def kept(self) -> int:
        """Visual tokens of all images that entered the LLM, newlines not counted."""
        return sum(image.kept for image in self.images)

    @property
    def tokens_per_layer(self) -> list[int]:
        """Prompt tokens of all rows in each LLM layer; the same everywhere for reduction before the LLM."""
        return [sum(after for _, after in self.prompt_lengths)] * self.llm.layers

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key-value cache after prefill, all rows."""
        return sum(kv_bytes(self.llm, after) for _, after in self.prompt_lengths)

    @property
    def kv_bytes_full(self) -> int:
        """Bytes that the cache would have taken without reduction."""
        return sum(kv_bytes(self.llm, before) for before, _ in self.prompt_lengths)

    @property
    def flops(self) -> int:
        """FLOPs of prefill in the LLM, all rows."""
        return sum(prefill_flops(self.llm, after) for _, after in self.prompt_lengths)

    @property
    def flops_full(self) -> int:
        """FLOPs that prefill would have taken without reduction."""
        return sum(prefill_flops(self.llm, before) for before, _ in self.prompt_lengths)

    def summary(self) -> dict[str, Any]:
        """Return the totals as plain numbers, and where attention was read."""
        return {
            "images": len(self.images),
            "asked": self.asked,
            "kept": self.kept,
            "valid": sum(image.valid for image in self.images),
            "newlines": sum(image.newlines for image in self.images),
            "prompt_length": sum(after for _, after in self.prompt_lengths),
            "prompt_length_full": sum(before for before, _ in self.prompt_lengths),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_full": self.kv_bytes_full,
            "prefill_flops": self.flops,
            "prefill_flops_full": self.flops_full,
            "second_look_flops": self.second_look_flops,
            "attention": self.attention,
        }

    def __str__(self) -> str:
        """Return one line for people."""
        if not self.prompt_lengths:
            return "no image seen"
        parts = [
            f"{len(self.images)} image(s): {self.asked} tokens asked, {self.kept} kept",
            f"KV cache {self.kv_bytes / self.kv_bytes_full:.1%} and prefill FLOPs "
            f"{self.flops / self.flops_full:.1%} of full",
        ]
        if self.attention is not None:
            parts.append(f"attention: {self.attention}")
        if self.second_look_flops:
            parts.append(f"second look: {self.second_look_flops / 1e9:.2f} GFLOPs")
        return "; ".join(parts)
