"""Qwen2-VL: native resolution, 2 x 2 patches become one token, M-RoPE."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.models._base.native_resolution import MergedPatchesAdapter


class Qwen2VLAdapter(MergedPatchesAdapter):
    """`Qwen2VLForConditionalGeneration`."""

    family: ClassVar[str] = "qwen2_vl"
    model_class: ClassVar[str] = "Qwen2VLForConditionalGeneration"
