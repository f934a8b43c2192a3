"""GLM-4.1V: native resolution; a convolution merges 2 x 2 patches into one token; M-RoPE."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.models._base.native_resolution import MergedPatchesAdapter


class Glm4vAdapter(MergedPatchesAdapter):
    """`Glm4vForConditionalGeneration`."""

    family: ClassVar[str] = "glm4v"
    model_class: ClassVar[str] = "Glm4vForConditionalGeneration"
