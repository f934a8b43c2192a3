"""Qwen2.5-VL: as Qwen2-VL, but most layers of the tower attend inside windows, and patches are ordered by window.

Signals are returned in the order of the image. In a layer with windows, a token receives attention only from its
window, which is no measure of its importance in the image. Attention is therefore captured in the nearest layer that
attends to the full image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from tokenprune.adapter import PackedTokens
from tokenprune.geometry import RECENT_LAYOUTS, TileGeometry
from tokenprune.models._base.compilable import CompilableAdapter
from tokenprune.models._base.native_resolution import MergedPatchesAdapter
from tokenprune.models._base.vision_inputs import read_once
from tokenprune.models._capture.compiled_tower import HostLengths
from tokenprune.models._capture.hooks import Tower, replaced_forward
from tokenprune.models._capture.patch_reduction import PatchReduction
from tokenprune.models._capture.vision_run import VisionRun

TOWER_FIELDS = ("last_hidden_state", "pooler_output")
"""Fields of the tower's output object."""


class Qwen25VLAdapter(MergedPatchesAdapter, CompilableAdapter):
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

    def run_vision_side(
        self,
        inputs: Mapping[str, Any],
        layouts: Sequence[TileGeometry],
        kinds_by_layer: dict[int, set[str]],
        truncated: bool,
        patches: PatchReduction | None = None,
    ) -> VisionRun:
        """Run the model's own `get_image_features`, with a compiled tower if there is one and the call is truncated."""
        compiled = self.compiled_tower
        if compiled is None or not truncated or self._output_options(inputs):
            return super().run_vision_side(inputs, layouts, kinds_by_layer, truncated, patches)
        grids, parts, captured = read_once(inputs["image_grid_thw"]), self.tower_parts(layouts), {}
        last = {max([self.feature_layer(inputs), *kinds_by_layer]): set[str]()}

        def encode(pixels: Tensor, grid_thw: Tensor, **options: Any) -> Any:
            layout, kinds, fields = tuple(grids.flatten().tolist()), {**last, **kinds_by_layer}, TOWER_FIELDS
            arguments = partial(self._tower_arguments, grids, grid_thw.device)
            (outputs, _), signals = compiled.run(layout, (pixels, grid_thw), parts, kinds, (), arguments, fields)
            captured.update(signals)
            return BaseModelOutputWithPooling(**outputs)

        with replaced_forward(self.tower, encode):
            outputs = self.run_vision(self.vision_arguments(inputs), layouts)
        return VisionRun(PackedTokens(self.split_features(outputs, layouts)), outputs, captured)

    def _tower_arguments(self, grids: Tensor, device: torch.device) -> dict[str, Any]:
        """Return the arguments of the tower that depend on the sizes of the images only.

        Args:
            grids: number of frames, rows and columns of each image on the CPU, `[images, 3]`.
            device: the device of the tower.
        """
        tower = self.tower
        with torch.inference_mode(False):  # a later call may run outside of inference mode
            windows, window_lengths = get_vision_window_index(
                grids, self.pooling, window_size=tower.window_size, patch_size=tower.patch_size
            )
            return {
                "position_ids": get_vision_position_ids(grids, self.pooling).to(device),
                "cu_seqlens": HostLengths(get_vision_cu_seqlens(grids).tolist()),
                "window_index": windows.to(device),
                "cu_window_seqlens": HostLengths(window_lengths.tolist()),
            }

    def sequence_order(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the index of each patch in the tower, which orders merge blocks by window, `[patches]`."""
        grids = tuple(read_once(inputs["image_grid_thw"]).flatten().tolist())
        tower, device = self.tower, inputs[self.pixels].device
        return window_order(grids, self.pooling, tower.window_size, tower.patch_size, device)


@lru_cache(maxsize=RECENT_LAYOUTS)
def window_order(
    grids: tuple[int, ...], pooling: int, window_size: int, patch_size: int, device: torch.device
) -> Tensor:
    """Return the index of each patch in a tower that orders merge blocks by window, `[patches]`.

    Args:
        grids: number of frames, rows and columns of all images, one after another.
        pooling: number of patches along a side of a merge block.
        window_size: side of a window in pixels.
        patch_size: side of a patch in pixels.
        device: the device of the table.
    """
    with torch.inference_mode(False):  # a later call may record gradients
        windows, _ = get_vision_window_index(torch.tensor(grids).view(-1, 3), pooling, window_size, patch_size)
        return (windows.argsort()[:, None] * pooling**2 + torch.arange(pooling**2)).flatten().to(device)


def nearest_layer(layer: int, candidates: Sequence[int]) -> int:
    """Return the candidate nearest to a layer, the deeper of two equally near; the layer itself without candidates."""
    return min(candidates, key=lambda candidate: (abs(candidate - layer), -candidate), default=layer)
