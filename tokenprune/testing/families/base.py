"""The class `Family`: a tiny model of a family or of a variant, its processor and its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from tokenprune.adapter import Adapter
from tokenprune.testing.examples import find_example
from tokenprune.testing.tiny_models import SENTENCES, random_image

TILE, PATCH = 56, 14
Size = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """A model family, or a variant of a family, in the test matrix.

    Args:
        name: name of the family; a variant adds its difference in parentheses.
        adapter: the adapter.
        processor: function that builds the real processor.
        tokens: special tokens of the config, by their name in the config (``"image_token_id"``, ...).
        image: placeholder of an image in a prompt.
        example: function that builds the model whose config and weights are used; by default the example of `adapter`.
        sizes: height x width in pixels of images for batches: a square image, and three images of other aspect ratios.
        spots: height x width in pixels of images that fill their tiles without a border, for the bright-spot checks.
        nested: whether the processor requires a list of images per prompt row.
        full: largest allowed difference of logits at a budget of 100 %.
        oracle: largest allowed difference of logits to the mask oracle; None if the architecture rules it out.
        beams: whether the unmodified model supports beam search with images.
        attn: name of the attention kernel.
        scale: factor on all weight matrices; larger weights make mistakes visible in the logits.
        why: reason for a `full` tolerance above 0, for `oracle` None and for `beams` False.
        skip: names of checks that the family cannot pass, each with its reason.
    """

    name: str
    adapter: type[Adapter]
    processor: Callable[[], Any]
    tokens: Mapping[str, str | list[str]] = field(default_factory=lambda: {"image_token_id": "<image>"})
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
        """Sizes of the images of four prompt rows: one image, two images, no image, one image."""
        square, wide, tall, band = self.sizes
        return [square], [wide, tall], [], [band]

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return a new tiny model with the special tokens of the processor; its weights are always the same.

        Args:
            dtype: the dtype of the weights.
        """
        example = (self.example or find_example(self.adapter).build_model)()
        config, tokenizer = copy.deepcopy(example.config), self.tokenizer
        for level in (config, config.get_text_config()):
            if hasattr(level, "vocab_size"):  # some configs store it twice
                level.vocab_size = len(tokenizer)
        for name, token in self.tokens.items():
            setattr(config, name, tokenizer.convert_tokens_to_ids(token))
        torch.manual_seed(0)
        model = type(example)._from_config(config, attn_implementation=self.attn)
        example_weights = example.state_dict()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif name in example_weights and example_weights[name].shape == parameter.shape:
                    parameter.copy_(example_weights[name])
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
        """Return a prompt with image placeholders.

        Args:
            images: the number of placeholders.
            number: selects the sentence of the prompt.
        """
        return "USER: " + f"{self.image} " * images + SENTENCES[1 + number % 4] + " ASSISTANT:"

    def batch(self, *rows: Sequence[Size], side: str = "left", first: int = 0) -> Any:
        """Return model inputs of several prompt rows with random images.

        Args:
            rows: height x width in pixels of the images of each row.
            side: the padding side.
            first: number of the first row; rows with the same number have the same images and text.
        """
        images = [
            [random_image(*size, seed=10 * (first + number) + k) for k, size in enumerate(sizes)]
            for number, sizes in enumerate(rows)
        ]
        return self.inputs(images, [self.text(len(row), first + number) for number, row in enumerate(rows)], side)

    def inputs(self, images: Sequence[Sequence[Image.Image]], texts: Sequence[str], side: str = "left") -> Any:
        """Return the processor's output for images and prompts.

        Args:
            images: the images of each row.
            texts: the prompt of each row.
            side: the padding side.
        """
        flat = [image for row in images for image in row]
        per_row = [list(row) for row in images]
        batch = self.processor()(
            images=(per_row if self.nested else flat) if flat else None,
            text=list(texts),
            return_tensors="pt",
            padding=True,
            padding_side=side,
        )
        return batch.to(torch.float32)  # the processor of Llama 4 returns bfloat16
