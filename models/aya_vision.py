"""Aya Vision: sub-images in row-major order, each after its name as text; the base tile last."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from tokenprune.models._base.tiled import TiledAdapter
from tokenprune.rewrite import TextSeparatorSide


class AyaVisionAdapter(TiledAdapter):
    """`AyaVisionForConditionalGeneration`: 2 x 2 patches of SigLIP become one token."""

    family: ClassVar[str] = "aya_vision"
    model_class: ClassVar[str] = "AyaVisionForConditionalGeneration"
    text_separator_side: ClassVar[TextSeparatorSide] = "before"
    projector_path: ClassVar[str | None] = None
    pooling_config_key: ClassVar[str | None] = "downsample_factor"
    projects_per_token: ClassVar[bool] = True
    grouped_by: ClassVar[Literal["opening", "closing"]] = "closing"

    def project_patches(self, patches: Tensor) -> Tensor:
        """Return the visual tokens of the given patches, which the projector processes as one small image per token."""
        tokens: Tensor = self.model.base_model.multi_modal_projector(self.apply_post_norm(patches))
        return tokens.flatten(0, -2)
