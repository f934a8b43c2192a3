"""DeepSeek-VL: one tile per image, padded to a square; no newline tokens."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.models._base.single_tile import SingleTileAdapter


class DeepseekVLAdapter(SingleTileAdapter):
    """`DeepseekVLForConditionalGeneration`: a SigLIP tower."""

    family: ClassVar[str] = "deepseek_vl"
    model_class: ClassVar[str] = "DeepseekVLForConditionalGeneration"
    tower_path: ClassVar[str] = "vision_model"
    projector_path: ClassVar[str | None] = "aligner"
    features_by_tile: ClassVar[bool] = True
    post_norm_path: ClassVar[str | None] = "post_layernorm"
    projects_per_token: ClassVar[bool] = True
