"""Qwen3-VL: as Qwen2-VL; features of earlier tower layers are added in the first layers of the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from tokenprune.adapter import Encoding, FeatureInputs
from tokenprune.models._base.native_resolution import MergedPatchesAdapter


class Qwen3VLAdapter(MergedPatchesAdapter):
    """`Qwen3VLForConditionalGeneration`; a token is kept or dropped in every level of features."""

    family: ClassVar[str] = "qwen3_vl"
    model_class: ClassVar[str] = "Qwen3VLForConditionalGeneration"

    @property
    def mergers(self) -> Sequence[nn.Module]:
        """The mergers of the last layer and of the earlier levels."""
        return [*super().mergers, *self.tower.deepstack_merger_list]

    @property
    def adds_features_until(self) -> int:
        """Number of first layers of the decoder whose inputs the model adds features to: layer 0 and one per level."""
        return 1 + len(self.model.config.vision_config.deepstack_visual_indexes)

    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], positions: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return `mm_encoder_outputs` with the kept features of every level."""
        features = super().features_to_inputs(encoding, packed, positions)
        outputs = features.inputs.get("mm_encoder_outputs", {}).get("image")
        if outputs is not None:
            positions = [torch.arange(len(tokens)) for tokens in packed] if positions is None else positions
            levels = [
                [
                    tokens[kept.to(tokens.device)]
                    for tokens, kept in zip(list(level) * encoding.repeats, positions, strict=True)
                    if len(kept)
                ]
                for level in outputs.deepstack_features
            ]
            outputs["deepstack_features"] = outputs.deepstack_features = levels
        return features
