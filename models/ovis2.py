"""Ovis2: the base tile first, then the sub-images in row-major order with text between them; pooled patches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.adapter import Encoding, FeatureInputs
from tokenprune.models._base.tiled import TiledAdapter
from tokenprune.models._base.vision_inputs import wrap_outputs


class Ovis2Adapter(TiledAdapter):
    """`Ovis2ForConditionalGeneration`; a token is a mixture of words of a visual vocabulary."""

    family: ClassVar[str] = "ovis2"
    model_class: ClassVar[str] = "Ovis2ForConditionalGeneration"
    layers_path: ClassVar[str] = "transformer.encoder.layers"
    attention_name: ClassVar[str] = "attention"
    tower_mlp_name: ClassVar[str] = "ffn"
    projector_path: ClassVar[str | None] = None
    base_first: ClassVar[bool] = True

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token."""
        return int(self.tower.config.hidden_stride)

    @property
    def indicator_ids(self) -> Sequence[int]:
        """Token ids of the text around tiles: start, after the base tile, between columns, between rows, end."""
        return self.model.config.visual_indicator_token_ids

    def grids(self, inputs: Mapping[str, Any], parts: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Return rows x cols of the sub-images, from the indicator ids after them."""
        rows = [1 + after.count(self.indicator_ids[3]) for after in self.ids_after(inputs, parts)]
        return [(r, (len(tiles) - 1) // r) if len(tiles) > 1 else (0, 0) for r, tiles in zip(rows, parts, strict=True)]

    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], positions: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return `mm_encoder_outputs` also if no token is kept: the output object embeds the text around the tiles."""
        if any(len(features) for features in packed):
            return super().features_to_inputs(encoding, packed, positions)
        outputs = copy.copy(encoding.outputs)
        outputs[self.features_field] = packed[0][:, None]
        return wrap_outputs(outputs, encoding.videos)
