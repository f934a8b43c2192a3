"""PaliGemma: one tile per image, no newline tokens; images and question attend to each other; positions start at 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.models._base.single_tile import SingleTileAdapter


class PaliGemmaAdapter(SingleTileAdapter):
    """`PaliGemmaForConditionalGeneration`, versions 1 and 2: a SigLIP tower."""

    family: ClassVar[str] = "paligemma"
    model_class: ClassVar[str] = "PaliGemmaForConditionalGeneration"
    features_by_tile: ClassVar[bool] = True
    post_norm_path: ClassVar[str | None] = "post_layernorm"
    projects_per_token: ClassVar[bool] = True

    def compute_forward_position_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the position ids that `forward` would compute. They start at 1; `generate` adds the 1 itself."""
        return super().compute_forward_position_ids(inputs) + 1

    def count_position_ids(self, mask: Tensor) -> Tensor:
        """Return position ids of the real positions, starting at 1."""
        return super().count_position_ids(mask) + 1
