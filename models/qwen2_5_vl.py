"""Qwen2.5-VL: as Qwen2-VL, but most layers of the tower attend inside windows, and patches are ordered by window.

Signals are returned in the order of the image. In a layer with windows, a token receives attention only from its
window, which is no measure of its importance in the image. Attention is therefore captured in the nearest layer that
attends to the full image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from tokenprune.geometry import TileGeometry
from tokenprune.models._base.native_resolution import MergedPatchesAdapter
from tokenprune.models._capture.hooks import Tower


class Qwen25VLAdapter(MergedPatchesAdapter):
    """`Qwen2_5_VLForConditionalGeneration`; attention rows come from the tower's `fullatt_block_indexes`."""

    family: ClassVar[str] = "qwen2_5_vl"
    model_class: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration"

    def tower_parts(self, layouts: Sequence[TileGeometry]) -> Tower:
        """Return the modules for capture, with attention rows from the nearest layer without windows.

        The configuration can name layers that the tower does not have. If it names only such layers, the attention rows
        of each layer are captured in the layer itself.
        """
        depth = len(self.tower_layers)
        full_attention = [layer for layer in self.tower.fullatt_block_indexes if 0 <= layer < depth]
        sources = {layer: nearest_layer(layer, full_attention) for layer in range(depth)}
        return replace(super().tower_parts(layouts), rows_from=sources)

    def sequence_order(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the index of each patch in the tower, which orders merge blocks by window, `[patches]`."""
        tower, block = self.tower, self.pooling**2
        windows, _ = get_vision_window_index(
            inputs["image_grid_thw"], self.pooling, tower.window_size, tower.patch_size
        )
        return (windows.argsort()[:, None] * block + torch.arange(block, device=windows.device)).flatten()


def nearest_layer(layer: int, candidates: Sequence[int]) -> int:
    """Return the candidate nearest to a layer, the deeper of two equally near; the layer itself without candidates."""
    return min(candidates, key=lambda candidate: (abs(candidate - layer), -candidate), default=layer)
