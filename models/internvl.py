"""InternVL: sub-images in row-major order, the base tile last; 2 x 2 patches become one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from tokenprune.image import Signal
from tokenprune.models._base.compilable import CompilableAdapter
from tokenprune.models._base.tiled import TiledAdapter


class InternVLAdapter(TiledAdapter, CompilableAdapter):
    """`InternVLForConditionalGeneration`: InternViT has a CLS token."""

    family: ClassVar[str] = "internvl"
    model_class: ClassVar[str] = "InternVLForConditionalGeneration"
    layers_path: ClassVar[str] = "encoder.layer"
    attention_name: ClassVar[str] = "attention"
    post_norm_path: ClassVar[str | None] = "layernorm"
    projects_per_token: ClassVar[bool] = True
    supports_image_embeds: ClassVar[bool] = True

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token."""
        return round(1 / float(self.model.config.downsample_ratio))

    def can_leave_early(self, inputs: Mapping[str, Any], needs: Sequence[Signal]) -> bool:
        """Return whether the tower can be left early: not if the call sets `vision_feature_layer`."""
        return inputs.get("vision_feature_layer") is None and super().can_leave_early(inputs, needs)

    def project_patches(self, patches: Tensor) -> Tensor:
        """Return the visual tokens of the given patches, which pixel shuffle processes as one small image per token."""
        is_last_layer = self.model.config.vision_feature_layer == -1
        patches = self.apply_post_norm(patches) if is_last_layer else patches
        small = rearrange(patches, "tokens (p q) width -> tokens p q width", p=self.pooling)
        shuffled = self.model.base_model.pixel_shuffle(small, scale_factor=self.model.config.downsample_ratio)
        return self.projector(rearrange(shuffled, "tokens 1 1 width -> 1 tokens width"))[0]
