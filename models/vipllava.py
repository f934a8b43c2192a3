"""ViP-LLaVA: one tile per image, no newline tokens; features of several layers side by side."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.models._base.single_tile import SingleTileAdapter


class VipLlavaAdapter(SingleTileAdapter):
    """`VipLlavaForConditionalGeneration`."""

    family: ClassVar[str] = "vipllava"
    model_class: ClassVar[str] = "VipLlavaForConditionalGeneration"
    features_by_tile: ClassVar[bool] = True
    resizable: ClassVar[bool] = True
    projects_per_token: ClassVar[bool] = True
