"""Granite 4 Vision: tiles as in LLaVA-NeXT, 2 x 2 patches a token; the LLM adds features in several layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.adapter import Encoding, FeatureInputs
from tokenprune.geometry import TileGeometry
from tokenprune.models.llava_next import LlavaNextAdapter


class Granite4VisionAdapter(LlavaNextAdapter):
    """`Granite4VisionForConditionalGeneration`.

    Each level is added at its own layer of the LLM. The features of a token are the features of all levels side by
    side, so that dropping, mixing and ordering tokens has the same effect on every level.
    """

    family: ClassVar[str] = "granite4_vision"
    model_class: ClassVar[str] = "Granite4VisionForConditionalGeneration"
    projector_path: ClassVar[str | None] = None
    resizable: ClassVar[bool] = False
    projects_per_token: ClassVar[bool] = False
    supports_image_embeds: ClassVar[bool] = False

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token.

        Raises:
            ValueError: if a token is not a whole number of patches.
        """
        rate = Fraction(self.model.config.downsample_rate)
        if rate.numerator != 1:
            raise ValueError(f"downsample_rate={rate} gives no whole number of patches per token; set it to 1/n")
        return rate.denominator

    @property
    def newline(self) -> Tensor | None:
        """The learned newline token, repeated for each level, `[levels * dim]`."""
        config = self.model.config
        newline: Tensor = self.model.base_model.image_newline
        return newline.repeat(len(config.deepstack_layer_map) + len(config.spatial_target_layers))

    @property
    def adds_features_until(self) -> int:
        """Number of first layers of the decoder whose inputs the model adds features to."""
        config = self.model.config
        return 1 + max([*(layer for _, layer in config.deepstack_layer_map), *config.spatial_target_layers])

    def feature_layer(self, inputs: Mapping[str, Any]) -> int:
        """Return the index of the deepest layer whose output the model uses."""
        config = self.model.config
        layers = [*(layer for layer, _ in config.deepstack_layer_map), config.spatial_vision_layer]
        return super().feature_layer({"vision_feature_layer": layers})

    def pack(self, tiles: Tensor, image_size: tuple[int, int], newline: Tensor) -> Tensor:
        """Return the tiles of an image as the model packs them, `[length, dim]`."""
        strategy = "default" if self.has_cls else "full"
        packed = self.model.base_model.pack_image_features([tiles], [image_size], strategy, image_newline=newline)
        return torch.as_tensor(packed[0])

    def split_features(self, outputs: Any, layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Return the tokens of each image, with all levels side by side, `[length, levels * dim]` each."""
        levels = [level for _, level in outputs.deepstack_features]
        return [torch.cat(image_levels, dim=-1) for image_levels in zip(*levels, strict=True)]

    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], positions: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return `mm_encoder_outputs` with the kept features of every level."""
        kept = [features for features in packed if len(features)]
        if not kept:
            return FeatureInputs({})
        outputs = copy.copy(encoding.outputs)  # `generate` expands it in place for beams
        layers = [layer for layer, _ in outputs.deepstack_features]
        levels = zip(*(features.chunk(len(layers), dim=-1) for features in kept), strict=True)
        outputs["deepstack_features"] = outputs.deepstack_features = [
            (layer, list(level)) for layer, level in zip(layers, levels, strict=True)
        ]
        return FeatureInputs({"mm_encoder_outputs": {"image": outputs}})
