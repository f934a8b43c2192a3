"""Qwen2.5-VL: as Qwen2-VL, but most layers of the tower attend inside windows, and patches stand window by window.

Signals are put back in the order of the image. In a layer with windows a token receives attention from its window
alone, which says nothing about the image: attention is read from the nearest layer that sees all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from tokenprune.image import TileGeometry
from tokenprune.models._base.example import with_sharp_attention
from tokenprune.models._base.native_resolution import EXAMPLE_IDS, MergedPatchesAdapter, example_mrope_llm
from tokenprune.models._capture.hooks import Tower


class Qwen25VLAdapter(MergedPatchesAdapter):
    """`Qwen2_5_VLForConditionalGeneration`; attention rows come from the tower's `fullatt_block_indexes`."""

    family: ClassVar[str] = "qwen2_5_vl"
    model_class: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny Qwen2.5-VL: windows of 2 x 2 tokens, and two of four layers that see the whole image."""
        torch.manual_seed(0)
        vision = {"depth": 4, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
        config = Qwen2_5_VLConfig(
            vision_config={**vision, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [0, 2]},
            text_config=example_mrope_llm(),
            **EXAMPLE_IDS,
        )
        return with_sharp_attention(Qwen2_5_VLForConditionalGeneration(config), tower="visual")

    def tower_parts(self, layouts: Sequence[TileGeometry]) -> Tower:
        """Return where signals are found; attention rows in the nearest layer without windows.

        The configuration may name layers that the tower does not have; if it names no other, each layer is read itself.
        """
        depth = len(self.tower_layers)
        whole = [layer for layer in self.tower.fullatt_block_indexes if 0 <= layer < depth]
        read = {layer: nearest(layer, whole) for layer in range(depth)}
        return replace(super().tower_parts(layouts), rows_from=read)

    def sequence_order(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return where each patch stands in the tower, which takes merge blocks window by window."""
        tower, block = self.tower, self.pooling**2
        windows, _ = get_vision_window_index(
            inputs["image_grid_thw"], self.pooling, tower.window_size, tower.patch_size
        )
        return (windows.argsort()[:, None] * block + torch.arange(block, device=windows.device)).flatten()


def nearest(layer: int, among: Sequence[int]) -> int:
    """Return the nearest of some layers, the deeper of two; the layer itself if there are none."""
    return min(among, key=lambda one: (abs(one - layer), -one), default=layer)
