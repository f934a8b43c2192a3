"""The classes `Example` and `PlaceholderExample`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokenprune.adapter import Adapter
from tokenprune.testing.examples.configs import EXAMPLE_PAD, EXAMPLE_TEXT
from tokenprune.testing.examples.text_model import build_text_model

Size = tuple[int, int]
"""Height x width of an image in pixels."""


class Example(ABC):
    """A tiny model of a family with random weights, and inputs for it.

    Args:
        adapter: an adapter of `adapter_class`, bound to a model from `build_model` or to a model of the same layout.
    """

    adapter_class: ClassVar[type[Adapter]]
    """The adapter of the family."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter

    @classmethod
    @abstractmethod
    def build_model(cls) -> Any:
        """Return a new tiny model; its weights are always the same."""

    @abstractmethod
    def build_inputs(self, rows: Sequence[Sequence[Size]]) -> dict[str, Any]:
        """Return inputs of `forward` and `generate` with random pixels, left-padded.

        Args:
            rows: for each prompt, height x width of its images in pixels.
        """

    def build_text_model(self) -> str:
        """Return the folder of a tiny CLIP checkpoint with random weights that fits the model.

        The example of an adapter that provides the signals of the question (`TEXT_SIGNALS`) implements this method.
        """
        raise NotImplementedError(f"{type(self).__name__} has no text model")


class PlaceholderExample(Example):
    """The example of an adapter that derives from `PlaceholderAdapter`."""

    @abstractmethod
    def build_pixels(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return the vision inputs of images with random pixels; equal sizes have equal pixels.

        Args:
            sizes: height x width of the images in pixels.
        """

    def build_inputs(self, rows: Sequence[Sequence[Size]]) -> dict[str, Any]:
        """Return inputs with random pixels and the number of placeholders that the layouts require."""
        sizes = list(dict.fromkeys(size for row in rows for size in row))
        layouts = zip(sizes, self.adapter.layouts(self.build_pixels(sizes)), strict=True)
        placeholders = {size: [self.adapter.image_token_id] * len(layout.packed) for size, layout in layouts}
        return self.build_prompts(rows, placeholders)

    def build_prompts(self, rows: Sequence[Sequence[Size]], images: Mapping[Size, Sequence[int]]) -> dict[str, Any]:
        """Return inputs with random pixels, left-padded.

        Args:
            rows: for each prompt, height x width of its images in pixels.
            images: the token ids of an image of each size.
        """
        prompts = [[1, *(token for size in row for token in [*images[size], *EXAMPLE_TEXT])] for row in rows]
        vision = self.build_pixels([size for row in rows for size in row])
        return {**pad_prompts(prompts), **vision}

    def build_text_model(self) -> str:
        """Return the folder of a tiny CLIP checkpoint whose vision tower has the width of the model's vision tower."""
        return build_text_model(self.adapter.tower.config.hidden_size)


def pad_prompts(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the ids and the attention mask of prompts, padded on the left, `[rows, length]` each.

    Args:
        prompts: the token ids of each prompt.
    """
    length = max(map(len, prompts))
    ids = torch.tensor([[EXAMPLE_PAD] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != EXAMPLE_PAD).long()}


def seed_pixels(size: Size) -> torch.Generator:
    """Return the random generator of the pixels of an image.

    Args:
        size: height x width of the image in pixels.
    """
    return torch.Generator().manual_seed(10_000 * size[0] + size[1])
