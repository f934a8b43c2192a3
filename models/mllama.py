"""Llama 3.2 Vision: the LLM cross-attends to the tiles of an image; there is no base tile.

This adapter treats the canvas of all tiles as one tile. The CLS token of each tile is among the keys of the LLM: it is
represented as the newline token after its tile, and is kept with the tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from tokenprune.adapter import Encoding, FeatureInputs
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.image import token_dim
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.models._base.vision_inputs import read_once
from tokenprune.models._capture.hooks import replaced_forward


class MllamaAdapter(PlaceholderAdapter):
    """`MllamaForConditionalGeneration`: kept keys enter through the argument for pixels, with four dimensions.

    During such a call the vision model returns the keys unchanged, and the cross-attention mask contains the columns of
    the kept keys only. The prompt does not change.
    """

    family: ClassVar[str] = "mllama"
    model_class: ClassVar[str] = "MllamaForConditionalGeneration"
    has_prompt_tokens: ClassVar[bool] = False
    tower_path: ClassVar[str] = "vision_model"
    patch_steps: ClassVar[frozenset[str]] = frozenset()  # a sequence holds four tiles, their CLS tokens and padding
    layers_path: ClassVar[str] = "transformer.layers"
    projector_path: ClassVar[str | None] = None
    required_inputs: ClassVar[tuple[str, ...]] = ("aspect_ratio_ids", "aspect_ratio_mask")
    image_inputs = frozenset({"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"})

    @property
    def image_token_id(self) -> int:
        """Token id of the mark at the position of an image."""
        return int(self.model.config.image_token_index)

    @cached_property
    def keys_per_tile(self) -> int:
        """Number of tokens of one tile, including its CLS token."""
        return int(self.tower.num_patches)

    def grids(self, inputs: Mapping[str, Any]) -> list[tuple[int, int, int, int]]:
        """Return the prompt row, the number in the row, and rows x cols of the tiles, for each image.

        Raises:
            ValueError: if the ids of the aspect ratios do not fit the pixels, or an id has no aspect ratio.
        """
        rows, images = inputs[self.pixels].shape[:2]
        ratios = self.tower.config.supported_aspect_ratios
        ids = read_once(self.input_tensor(inputs, "aspect_ratio_ids", (rows, images)))
        if bool((ids > len(ratios)).any()):
            raise self.input_error(f"aspect_ratio_ids={ids.tolist()} exceed the {len(ratios)} known aspect ratios")
        return [(row, number, *ratios[int(ids[row, number]) - 1]) for row, number in ids.nonzero().tolist()]

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the canvas of each image as one tile, packed tile by tile, with CLS after each tile.

        Raises:
            ValueError: if a vision input is missing, or does not fit the pixels.
        """
        self.check_inputs(inputs)
        rows, images, tiles = inputs[self.pixels].shape[:3]
        self.input_tensor(inputs, "aspect_ratio_mask", (rows, images, tiles))
        (height, width), out = self.token_grid, []
        for _, _, rows, cols in self.grids(inputs):
            canvas = torch.arange(rows * height * cols * width).view(rows * height, cols * width)
            tiles = rearrange(canvas, "(rows h) (cols w) -> (rows cols) (h w)", rows=rows, cols=cols)
            packed = F.pad(tiles, (0, 1), value=NEWLINE).flatten()
            out.append(TileGeometry((0, 0), (rows * height, cols * width), torch.zeros(0, 4), packed))
        return out

    def run_vision(self, arguments: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Any:
        """Run the vision model without the projector; return the packed keys of each image as `pooler_output`."""
        states = self.tower(**arguments).last_hidden_state
        tiles = states[torch.as_tensor(arguments["aspect_ratio_ids"], device=states.device) > 0]
        ordered = tiles.roll(-1, dims=2)  # CLS is first in its tile
        keys = [
            image[: len(layout.packed) // self.keys_per_tile].flatten(0, 1)
            for image, layout in zip(ordered, layouts, strict=True)
        ]
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=keys)  # type: ignore[arg-type]

    def split_by_image(
        self, kind: str, captured: Sequence[Tensor], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return a captured signal for each image as a canvas, without CLS and padding of the tiles."""
        dim = token_dim(kind)
        signal = torch.cat(list(captured))
        signal = signal[torch.as_tensor(inputs["aspect_ratio_ids"], device=signal.device).flatten() > 0]
        tiles = signal.unflatten(dim, (self.tower.config.max_num_tiles, -1)).movedim((dim, dim + 1), (1, 2))
        (height, width), out = self.token_grid, []
        for value, (_, _, rows, cols) in zip(tiles[:, :, 1 : self.keys_per_tile], self.grids(inputs), strict=True):
            sizes = {"rows": rows, "cols": cols, "h": height, "w": width}
            to_canvas = "(rows cols) (h w) ... -> 1 (rows h cols w) ..."
            out.append(rearrange(value[: rows * cols], to_canvas, **sizes).movedim(1, dim))
        return out

    def split_pixels(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the canvas of each image, `[1, 3, height, width]` each."""
        to_canvas, pixels = "(rows cols) c h w -> 1 c (rows h) (cols w)", inputs[self.pixels]
        return [
            rearrange(pixels[row, number, : rows * cols], to_canvas, rows=rows)
            for row, number, rows, cols in self.grids(inputs)
        ]

    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], positions: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return the padded kept keys in place of the pixels, `[rows, images, keys, dim]`, and the context of the call.

        Inside the context, the vision model returns the keys, and the cross-attention mask is shortened to them.
        """
        inputs = encoding.inputs
        grids, (rows, images) = self.grids(inputs), inputs["aspect_ratio_ids"].shape
        times = len(packed) // len(grids)
        shared = {name: inputs[name].repeat_interleave(times, dim=0) for name in self.image_inputs - {self.pixels}}
        positions = [torch.arange(len(keys), device=keys.device) for keys in packed] if positions is None else positions
        keys_by_row: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(rows * times)]
        for number, (keys, kept) in enumerate(zip(packed, positions, strict=True)):
            row, image, _, _ = grids[number % len(grids)]
            first = image * self.tower.config.max_num_tiles * self.keys_per_tile
            tile, in_tile = kept // self.keys_per_tile, kept % self.keys_per_tile
            column = first + tile * self.keys_per_tile + (in_tile + 1) % self.keys_per_tile
            keys_by_row[row * times + number // len(grids)].append((keys, column))
        lengths = [sum(len(keys) for keys, _ in parts) for parts in keys_by_row]
        width = images * -(-max(1, *lengths) // images)
        states = packed[0].new_zeros(len(keys_by_row), width, packed[0].shape[-1])
        columns = torch.zeros(len(keys_by_row), width, dtype=torch.long, device=states.device)
        for row, parts in enumerate(keys_by_row):
            for source, target in zip(zip(*parts, strict=True), (states, columns), strict=False):
                target[row, : lengths[row]] = torch.cat(source).to(target.dtype)
        real = torch.arange(width, device=states.device) < torch.tensor(lengths, device=states.device)[:, None]
        return FeatureInputs(
            {self.pixels: states.unflatten(1, (images, -1)), **shared}, self._accept_keys(columns, real)
        )

    def complete_inputs(self, encoding: Encoding) -> FeatureInputs:
        """Return the vision inputs of the call, so that the model encodes them again, exactly as without a strategy."""
        inputs = encoding.inputs
        return FeatureInputs({name: value.repeat_interleave(encoding.repeats, dim=0) for name, value in inputs.items()})

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether a call contains pixels; keys have four dimensions."""
        return super().has_images(inputs) and inputs[self.pixels].dim() != 4

    @contextmanager
    def _accept_keys(self, kept_columns: Tensor, real: Tensor) -> Iterator[None]:
        """Inside the block, the vision model returns keys unchanged, and the cross-attention mask is cut to them.

        Args:
            kept_columns: the column of the full mask of each kept key, `[rows, keys]`.
            real: True for keys, False for padding, bool `[rows, keys]`.
        """
        original = self.tower.forward

        def forward(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            if pixel_values.dim() != 4:
                return original(pixel_values, *args, **kwargs)
            return BaseModelOutput(last_hidden_state=pixel_values[:, :, None])

        def cut(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            mask = kwargs.get("cross_attention_mask")
            if mask is None:
                return None
            repeats = len(mask) // len(real)  # of beams
            columns, is_key = (value.repeat_interleave(repeats, dim=0) for value in (kept_columns, real))
            least = torch.finfo(mask.dtype).min
            barred = ~is_key[:, None, None] & is_key.any(dim=-1)[:, None, None, None]
            kept = mask.gather(-1, columns[:, None, None].expand(-1, -1, mask.shape[2], -1))
            visible = (kept != least).logical_and(is_key[:, None, None]).any(-1, True)
            visible = kwargs["full_text_row_masked_out_mask"] * visible
            # As in the model, text before the first image attends to all keys alike.
            kept = (kept * visible).masked_fill(barred, least)
            masks = {"cross_attention_mask": kept, "full_text_row_masked_out_mask": visible}
            return args, {**kwargs, **masks, **self._in_static_cache(kwargs, kept)}

        hook = self.decoder.register_forward_pre_hook(cut, with_kwargs=True)
        try:
            with replaced_forward(self.tower, forward):
                yield
        finally:
            hook.remove()

    def _in_static_cache(self, kwargs: Mapping[str, Any], mask: Tensor) -> dict[str, Tensor]:
        """Return keys and mask padded to the length of a static cache; an empty dictionary for caches that grow."""
        cache = next((kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None), None)
        layer = self.model.config.get_text_config().cross_attention_layers[0]
        layer_cache = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
        missing = (getattr(layer_cache, "max_cache_len", None) or 0) - mask.shape[-1]
        if missing <= 0:
            return {}
        padded, states = {}, kwargs.get("cross_attention_states")
        if states is not None:
            rows = states.reshape(len(mask), -1, states.shape[-1])
            padded["cross_attention_states"] = F.pad(rows, (0, 0, 0, missing))
        return {**padded, "cross_attention_mask": F.pad(mask, (0, missing), value=torch.finfo(mask.dtype).min)}
