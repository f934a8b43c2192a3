"""Phi-4-multimodal: sub-images with a newline token after each row, a newline token, and the base tile likewise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenprune.adapter import Encoding, FeatureInputs
from tokenprune.capabilities import HasDecoder
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.models._base.vision_inputs import read_once
from tokenprune.models._capture.hooks import replaced_forward


class Phi4MultimodalAdapter(PlaceholderAdapter, HasDecoder):
    """`Phi4MultimodalForCausalLM`, in which one module encodes images and inserts them into the prompt.

    Encoding calls this module with a prompt of placeholders only. Kept features enter through the argument for pixels:
    during such a call, the module treats pixels with three dimensions as encoded features.
    """

    family: ClassVar[str] = "phi4_multimodal"
    model_class: ClassVar[str] = "Phi4MultimodalForCausalLM"
    patch_steps: ClassVar[frozenset[str]] = frozenset({"drop"})  # padded patches must not be merged
    pixels: ClassVar[str] = "image_pixel_values"
    tower_path: ClassVar[str] = "embed_tokens_extend.image_embed.img_processor"
    projector_path: ClassVar[str | None] = None
    required_inputs: ClassVar[tuple[str, ...]] = ("image_sizes", "image_attention_mask")
    image_inputs = frozenset({"image_pixel_values", "image_sizes", "image_attention_mask"})

    @property
    def embedder(self) -> Any:
        """The module that encodes images and inserts them into the embedded prompt."""
        return self.model.base_model.embed_tokens_extend.image_embed

    @cached_property
    def decoder(self) -> Any:
        """The module with the decoder layers."""
        return self.model.base_model

    @property
    def image_token_id(self) -> int:
        """Token id of the image placeholder."""
        return int(self.model.config.vision_config.image_token_id)

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token."""
        return 2

    def feature_layer(self, inputs: Mapping[str, Any]) -> int:
        """Return the index of the layer whose output the model uses."""
        layer: int = self.embedder.layer_idx
        return layer - 1 if layer >= 0 else len(self.tower_layers) + layer

    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image, from its canvas size and its padding mask.

        Raises:
            ValueError: if the tower has an odd number of patches along a side, because the model then mirrors the
                border; or if a vision input is missing or does not fit the pixels.
        """
        self.check_inputs(inputs)
        patches = self.tower.config.image_size // self.tower.config.patch_size
        if patches % 2:
            raise ValueError(f"{patches} patches along a side are not a whole number of tokens of 2 x 2 patches")
        images, tiles = inputs[self.pixels].shape[:2]
        masks = read_once(self.input_tensor(inputs, "image_attention_mask", (images, tiles, patches, patches))).bool()
        sizes = read_once(self.input_tensor(inputs, "image_sizes", (images, 2))).tolist()
        return [self.layout(size, mask) for size, mask in zip(sizes, masks, strict=True)]

    def layout(self, size: Sequence[int], mask: Tensor) -> TileGeometry:
        """Return the layout of one image.

        Args:
            size: height x width of its canvas in pixels.
            mask: True for patches that are not padding, base tile first, bool `[tiles, patches, patches]`.
        """
        rows, cols = (side // self.embedder.crop_size for side in size)
        unpadded = TileGeometry.tiled((rows, cols), self.token_grid, base_first=True)
        to_canvas = "(rows cols) h w -> (rows h) (cols w)"
        real = rearrange(mask[1 : 1 + rows * cols, ::2, ::2], to_canvas, rows=rows)
        numbers = unpadded.packed.view(-1, *self.token_grid)
        canvas = rearrange(numbers[1:], to_canvas, rows=rows)[: int(real[:, 0].sum()), : int(real[0].sum())]
        parts = [F.pad(lines, (0, 1), value=NEWLINE).flatten() for lines in (canvas, numbers[0])]
        packed = torch.cat([parts[0], torch.tensor([NEWLINE]), parts[1]])
        return TileGeometry(unpadded.tile_grid, unpadded.token_grid, unpadded.regions, packed)

    def run_vision(self, arguments: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Any:
        """Embed a prompt of placeholders with the model; return the embeddings as `pooler_output`."""
        length, device = sum(len(layout.packed) for layout in layouts), arguments[self.pixels].device
        ids = torch.full((1, length), self.image_token_id, device=device)
        embeds = torch.zeros(1, length, self.model.config.hidden_size, dtype=self.model.dtype, device=device)
        return BaseModelOutputWithPooling(pooler_output=self.embedder(ids, embeds, **arguments))

    def split_by_image(
        self, kind: str, captured: Sequence[Tensor], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return a captured signal for each image, without the padding tiles that the tower also encodes."""
        signals = torch.cat(list(captured)).unflatten(0, (len(layouts), -1))
        unpadded = torch.cat([signal[: layout.tiles] for signal, layout in zip(signals, layouts, strict=True)])
        return super().split_by_image(kind, [unpadded], layouts, inputs)

    def split_pixels(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the pixels of each image, `[tiles, 3, height, width]` each; padding tiles can follow."""
        return list(inputs[self.pixels])

    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], positions: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return kept features in place of the pixels, `[1, kept, dim]`, and the context in which they are accepted."""
        features = torch.cat(packed)
        if not len(features):
            return FeatureInputs({})
        return FeatureInputs({self.pixels: features[None]}, self._accept_features())

    def complete_inputs(self, encoding: Encoding) -> FeatureInputs:
        """Return the vision inputs of the call, so that the model encodes them again, exactly as without a strategy."""
        inputs = encoding.inputs
        return FeatureInputs({name: torch.cat([value] * encoding.repeats) for name, value in inputs.items()})

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether a call contains pixels; features have three dimensions."""
        return super().has_images(inputs) and inputs[self.pixels].dim() != 3

    @contextmanager
    def _accept_features(self) -> Iterator[None]:
        """Inside the block, the embedding module accepts encoded features in place of pixels."""
        module = self.embedder
        original = module.forward

        def forward(input_ids: Tensor, inputs_embeds: Tensor, image_pixel_values: Tensor, **options: Any) -> Any:
            if image_pixel_values.dim() != 3:
                return original(input_ids, inputs_embeds, image_pixel_values=image_pixel_values, **options)
            mask, times = input_ids == self.image_token_id, len(image_pixel_values)  # beams repeat each row
            parts = image_pixel_values[0].split(mask[::times].sum(dim=1).tolist())
            features = torch.cat([part for part in parts for _ in range(times)]).to(inputs_embeds.dtype)
            return module.drop(inputs_embeds.masked_scatter(mask[..., None], features))

        with replaced_forward(module, forward):
            yield
