"""What the families of the test matrix share: tokenizer, tiny model and inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from tests.helpers.tiny import SENTENCES, random_image
from tokenprune.adapter import Adapter

TILE, PATCH = 56, 14
Size = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    Args:
        name: of the family, and what is special if it has several rows.
        adapter: its adapter.
        processor: builds the real processor.
        tokens: the tokens of the tokenizer that the config names, by name in the config (``"image_token_id"``, ...).
        image: what stands for an image in the text that the processor is given.
        example: builds a model whose config is taken; that of the adapter if left out.
        sizes: height x width of images for batches: a square one, and three of other aspect ratios.
        spots: height x width of images whose tiles show them without a border, for the bright spot.
        nested: whether the processor wants the images of each row in a list of their own.
        full: largest difference of logits at 100 %.
        oracle: largest difference of logits to the mask oracle; None if the architecture forbids it, and `why` says so.
        beams: whether the unmodified model generates with beams from images.
        attn: the attention kernel.
        scale: factor on all weights, so that mistakes show; smaller where a model is initialized with large ones.
        why: the reasons for what is not 0 or not done.
        skip: names of checks that cannot hold, each with its reason.
    """

    name: str
    adapter: type[Adapter]
    processor: Callable[[], Any]
    tokens: Mapping[str, str] = field(default_factory=lambda: {"image_token_id": "<image>"})
    image: str = "<image>"
    example: Callable[[], Any] | None = None
    sizes: tuple[Size, Size, Size, Size] = ((112, 112), (60, 160), (150, 50), (40, 170))
    spots: tuple[Size, ...] = ((112, 112), (56, 112), (112, 56))
    nested: bool = False
    full: float = 0.0
    oracle: float | None = 1e-5
    beams: bool = True
    attn: str = "sdpa"
    scale: float = 2.0
    why: str = ""
    skip: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[list[Size], ...]:
        """Different aspect ratios, several images in a row, and a row without an image."""
        square, wide, tall, band = self.sizes
        return [square], [wide, tall], [], [band]

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """A new tiny model that speaks the processor's tokens, the same weights each time."""
        example = (self.example or self.adapter.example)()
        config, tokenizer = copy.deepcopy(example.config), self.tokenizer
        for part in (config, config.get_text_config()):
            if hasattr(part, "vocab_size"):  # some families say it twice
                part.vocab_size = len(tokenizer)
        for name, token in self.tokens.items():
            setattr(config, name, tokenizer.convert_tokens_to_ids(token))
        torch.manual_seed(0)
        model = type(example)._from_config(config, attn_implementation=self.attn)
        sharp = example.state_dict()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif name in sharp and sharp[name].shape == parameter.shape:
                    parameter.copy_(sharp[name])
                if parameter.dim() >= 2:
                    parameter.mul_(self.scale)
            model.get_output_embeddings().weight.mul_(10.0)
        model.generation_config.pad_token_id = 0
        model.generation_config.bos_token_id = 1
        model.generation_config.eos_token_id = 2
        return model.eval().to(dtype)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor."""
        return self.processor().tokenizer

    def text(self, images: int, number: int = 0) -> str:
        """A prompt about some images."""
        return "USER: " + f"{self.image} " * images + SENTENCES[1 + number % 4] + " ASSISTANT:"

    def batch(self, *rows: Sequence[Size], side: str = "left", first: int = 0) -> Any:
        """Model inputs of several prompt rows, each with images of the given height x width.

        Args:
            rows: the sizes of each row.
            side: of padding.
            first: number of the first row: rows of the same number have the same images and text.
        """
        images = [
            [random_image(*size, seed=10 * (first + number) + k) for k, size in enumerate(sizes)]
            for number, sizes in enumerate(rows)
        ]
        return self.inputs(images, [self.text(len(row), first + number) for number, row in enumerate(rows)], side)

    def inputs(self, images: Sequence[Sequence[Image.Image]], texts: Sequence[str], side: str = "left") -> Any:
        """What the processor makes of images and prompts."""
        flat = [one for row in images for one in row]
        images = (list(map(list, images)) if self.nested else flat) if flat else None
        made = self.processor()(images=images, text=list(texts), return_tensors="pt", padding=True, padding_side=side)
        return made.to(torch.float32)  # Llama 4's makes bfloat16
