"""Command A Vision: sub-images in row-major order with a line break after each; the base tile last."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from tokenprune.models._base.tiled import TiledAdapter
from tokenprune.rewrite import TextSeparatorSide


class Cohere2VisionAdapter(TiledAdapter):
    """`Cohere2VisionForConditionalGeneration`: 2 x 2 patches of SigLIP become one token."""

    family: ClassVar[str] = "cohere2_vision"
    model_class: ClassVar[str] = "Cohere2VisionForConditionalGeneration"
    text_separator_side: ClassVar[TextSeparatorSide] = "after"
    projector_path: ClassVar[str | None] = None
    pooling_config_key: ClassVar[str | None] = "downsample_factor"
    post_norm_path: ClassVar[str | None] = "post_layernorm"
    projects_per_token: ClassVar[bool] = True

    def project_patches(self, patches: Tensor) -> Tensor:
        """Return the visual tokens of the given patches, which the projector processes as one small image per token."""
        tokens: Tensor = self.model.base_model.multi_modal_projector(self.apply_post_norm(patches))
        return tokens.flatten(0, -2)
