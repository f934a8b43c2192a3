"""Runs a model on the meta device, from the image to the second new token, and counts each phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    LlavaNextImageProcessor,
    LlavaOnevisionImageProcessor,
    Qwen2VLImageProcessor,
)

from tokenprune.adapter import find_adapter
from tokenprune.budget import Budget, as_budget
from tokenprune.experiments.bench.cost.meter import Meter, Work
from tokenprune.image import EncodedImage, TileGeometry
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.models._base.tiled import TiledAdapter
from tokenprune.selection import Selection
from tokenprune.strategies import UniformStride


@dataclass(frozen=True)
class Tokens:
    """The tokens of one prompt row.

    Args:
        encoded: tokens that the tower puts out, padding included.
        full: visual tokens that would enter the LLM, and newlines.
        kept: visual tokens that enter the LLM.
        newlines: newline tokens that enter the LLM.
        text: all others.
    """

    encoded: int
    full: int
    kept: int
    newlines: int
    text: int

    @property
    def prompt(self) -> int:
        """Length of the prompt."""
        return self.kept + self.newlines + self.text


@dataclass(frozen=True)
class Counted:
    """One batch, counted.

    Args:
        batch: prompts, each with one image.
        budget: what may enter the LLM; None keeps all.
        tokens: tokens of each prompt.
        weight_bytes: bytes of all parameters and buffers.
        kv_bytes: bytes of the key-value cache after prefill.
        encode: images through tower and projector.
        prefill: the prompt through the LLM, to the first new token.
        decode: one more token.
        tower_flops: the part of ``encode`` that the vision tower has; all of it where the tower holds the projector.
    """

    batch: int
    budget: Budget | None
    tokens: Tokens
    weight_bytes: int
    kv_bytes: int
    encode: Work
    prefill: Work
    decode: Work
    tower_flops: int

    @property
    def phases(self) -> dict[str, Work]:
        """The phases by name."""
        return {"encode": self.encode, "prefill": self.prefill, "decode_step": self.decode}

    def peak_bytes(self, new_tokens: int) -> int:
        """Return the most bytes that are needed at once.

        Args:
            new_tokens: tokens of an answer; the cache grows by all but the last.
        """
        growth = self.kv_bytes // self.tokens.prompt * (new_tokens - 1)
        phases = (self.encode.peak_bytes, self.prefill.peak_bytes, self.decode.peak_bytes + growth)
        return self.weight_bytes + max(phases)


def _side(config: Any) -> int:
    size = config.vision_config.image_size
    return int(size[0] if isinstance(size, (list, tuple)) else size)


PROCESSORS: Mapping[str, Callable[[Any], Any]] = {
    "llava": lambda config: CLIPImageProcessor(
        size={"shortest_edge": _side(config)}, crop_size={"height": _side(config), "width": _side(config)}
    ),
    "llava_next": lambda config: LlavaNextImageProcessor(
        size={"shortest_edge": _side(config)},
        crop_size={"height": _side(config), "width": _side(config)},
        image_grid_pinpoints=config.image_grid_pinpoints,
    ),
    "llava_onevision": lambda config: LlavaOnevisionImageProcessor(
        size={"height": _side(config), "width": _side(config)}, image_grid_pinpoints=config.image_grid_pinpoints
    ),
    "internvl": lambda config: GotOcr2ImageProcessor(
        size={"height": _side(config), "width": _side(config)}, crop_to_patches=True, min_patches=1, max_patches=12
    ),
    "qwen2_5_vl": lambda config: Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 3584 * 3584}),
}
"""The image processor of each family with the settings of its published checkpoints."""


def cut(adapter: PlaceholderAdapter, image_size: tuple[int, int]) -> tuple[dict[str, Tensor], TileGeometry]:
    """Return the vision inputs of one image and its layout: the processor cuts it, the adapter reads the layout.

    Args:
        adapter: an adapter of the family.
        image_size: height x width of the image in pixels.

    Raises:
        LookupError: if the image processor of the family is not known here.
    """
    if adapter.family not in PROCESSORS:
        raise LookupError(
            f"the cost of {adapter.family} is not known, since its image processor is not; known families: "
            f"{', '.join(sorted(PROCESSORS))}"
        )
    # Uneven on purpose: adapters may find the grid of an image by its looks.
    small = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    image = Image.fromarray(small).resize((image_size[1], image_size[0]))
    made = PROCESSORS[adapter.family](adapter.model.config)(images=[image], return_tensors="pt")
    inputs = {name: value for name, value in made.items() if name in adapter.image_inputs}
    prompt = dict(inputs)
    if isinstance(adapter, TiledAdapter):  # reads in the prompt which tiles belong to one image
        length = len(inputs[adapter.pixels]) * adapter.token_grid[0] * adapter.token_grid[1]
        prompt["input_ids"] = torch.full((1, length), adapter.image_token_id)
    (layout,) = adapter.layouts(prompt)
    return inputs, layout


def evenly_kept(layout: TileGeometry, budget: int | float | str | Budget, newlines: Any) -> Selection:
    """Return evenly spaced tokens, which stand for a method's choice.

    Args:
        layout: the layout of the image.
        budget: what may enter the LLM.
        newlines: which newlines stay, as in `TokenReducer.newlines`.
    """
    image = EncodedImage(geometry=layout, features=torch.zeros(layout.tiles, layout.tokens, 1))
    return UniformStride(budget, newlines=newlines).reduce(image)


def tokens_of(layout: TileGeometry, selection: Selection | None, text: int) -> Tokens:
    """Return the tokens of a prompt with one image.

    Args:
        layout: the layout of the image.
        selection: what may enter the LLM; None keeps all.
        text: tokens of the prompt beside the image.
    """
    encoded, full = layout.tiles * layout.tokens, len(layout.packed)
    if selection is None:
        return Tokens(encoded, full, full - layout.separators, layout.separators, text)
    return Tokens(encoded, full, selection.kept_tokens, selection.kept_newlines, text)


def _pixels(one: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """Return the pixels of a batch on the meta device; sizes stay on the CPU, since layouts are made from them."""
    return torch.empty(batch * one.shape[0], *one.shape[1:], dtype=dtype, device="meta")


def encode(
    adapter: PlaceholderAdapter,
    inputs: Mapping[str, Any],
    layout: TileGeometry,
    batch: int,
    selection: Selection | None,
) -> Any:
    """Encode as a reducer that reads no signals does it, or the plain model if nothing is selected.

    Args:
        adapter: the adapter of the model.
        inputs: the vision inputs of the batch.
        layout: the layout of each image.
        batch: number of images.
        selection: what stays of each.
    """
    if selection is None or selection.everything or not adapter.can_leave_early(inputs, ()):
        return adapter.model.base_model.get_image_features(**inputs, return_dict=True)
    tokens, _, _ = adapter.run_tower(inputs, [layout] * batch, {}, truncated=True)
    return tokens.gather([selection.packed_mask()] * batch)


def count(
    model: Any,
    image_size: tuple[int, int],
    budget: int | float | str | Budget | None = None,
    batch: int = 1,
    text_tokens: int = 60,
    newlines: Any = "keep_rows",
    all_logits: bool = False,
    whole: bool = False,
) -> Counted:
    """Count one batch: encode, prefill, one decode step.

    Args:
        model: a model on the meta device.
        image_size: height x width of the images in pixels.
        budget: what may enter the LLM; None keeps all.
        batch: prompts, each with one image of that size.
        text_tokens: tokens of each prompt beside the image.
        newlines: which newlines stay, as in `TokenReducer.newlines`.
        all_logits: logits for the whole prompt in float32, as transformers made them before 4.45, not for its last
            token alone.
        whole: encode images whole before tokens are chosen, as published code does.

    Raises:
        TypeError: if no adapter knows the model.
        LookupError: if the image processor of the family is not known here.
    """
    adapter = find_adapter(model)
    if not isinstance(adapter, PlaceholderAdapter):
        raise TypeError(f"the cost of {adapter.family} is not known: {type(adapter).__name__} lays out no images")
    inputs, layout = cut(adapter, image_size)
    selection = None if budget is None else evenly_kept(layout, budget, newlines)
    tokens = tokens_of(layout, selection, text_tokens)
    dim, meter, dtype = model.config.get_text_config().hidden_size, Meter(), model.dtype

    def step(length: int, start: int, cache: Any) -> Any:
        embeds = torch.empty(batch, length, dim, dtype=dtype, device="meta")
        places = torch.arange(start, start + length, device="meta").expand(batch, -1)
        places = places.expand(3, -1, -1) if adapter.vision_positions else places
        keep = 0 if all_logits else 1
        out = model(
            inputs_embeds=embeds, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=keep
        )
        return out.past_key_values, out.logits.float()

    with torch.inference_mode():
        with meter.phase() as encoding:
            given = {
                name: _pixels(value, batch, dtype) if name == adapter.pixels else torch.cat([value] * batch)
                for name, value in inputs.items()
            }
            encoded = encode(adapter, given, layout, batch, None if whole else selection)
        with meter.phase() as prefill:
            cache, logits = step(tokens.prompt, 0, None)
        kv_bytes = sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values))
        del encoded, logits, given
        with meter.phase() as decode:
            step(1, tokens.prompt, cache)
    projected = 0 if adapter.projector_path is None else encoding.modules.get(type(adapter.projector).__name__, 0)
    parts = {id(one): one.nbytes for one in (*model.parameters(), *model.buffers())}
    asked = None if budget is None else as_budget(budget)
    return Counted(
        batch, asked, tokens, sum(parts.values()), kv_bytes, encoding, prefill, decode, encoding.flops - projected
    )
