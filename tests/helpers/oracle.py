"""Oracles of reduced models: the masked full prompt, generated ids, and traces that an attached strategy may leave."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenprune.adapter import find_adapter
from tokenprune.image import EncodedImage, Signal, TileGeometry
from tokenprune.reducer import ScoreReducer
from tokenprune.run import Run
from tokenprune.selection import Selection
from tokenprune.testing.families.base import Size


def generate(model: Any, inputs: Any, **how: Any) -> Tensor:
    """Generate four tokens; a random model would write image placeholders itself, so these are suppressed."""
    torch.manual_seed(0)
    suppress = [find_adapter(model).image_token_id]
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, suppress_tokens=suppress, **how)


def kept_mask(model: Any, inputs: Any, run: Run) -> Tensor:
    """Which positions of the full prompt stay, from the selections alone, bool `[rows, length]`."""
    stays = inputs["attention_mask"].bool().clone()
    placeholders = inputs["input_ids"] == find_adapter(model).image_token_id
    stays[placeholders] = torch.cat([s.packed_mask() for s in run.selections])
    return stays


def oracle_inputs(model: Any, inputs: Any, run: Run, positions: str) -> dict[str, Any]:
    """The full prompt with dropped positions masked, and the position ids that the kept ones have."""
    stays = kept_mask(model, inputs, run)
    adapter = find_adapter(model)
    ids = adapter.counted_positions(stays) if positions == "reindex" else adapter.positions(inputs, generating=False)
    ids = ids.expand(*ids.shape[:-2], *stays.shape)
    return {**inputs, "attention_mask": stays.long(), "position_ids": ids}


def real_of_short(model: Any, inputs: Any, run: Run) -> Tensor:
    """Which positions of the shorter, left-padded prompt are real, bool `[rows, width]`."""
    lengths = kept_mask(model, inputs, run).sum(1)
    width = int(lengths.max())
    return torch.arange(width) >= width - lengths[:, None]


def traces(model: Any) -> list[Any]:
    """Everything that an attached reducer could leave behind."""
    hooks = [
        (n, list(m._forward_pre_hooks), list(m._forward_hooks), id(vars(m).get("config")))
        for n, m in model.named_modules()
    ]
    return [*hooks, sorted(model.__dict__), model.__dict__.get("generate")]


SPOTS = [(0.2, 0.85), (0.85, 0.2), (0.7, 0.6)]
"""Where the spot is, as fractions of the image; off the diagonal, and never on the edge of a token."""


@dataclass
class Odd(ScoreReducer):
    """Keeps the tokens that differ most from the others of their tile."""

    kind: str = "features"

    @property
    def needs(self) -> list[Signal]:
        return [] if self.kind == "features" else [Signal(self.kind, "feature")]

    def score(self, image: EncodedImage) -> Tensor:
        values = image.features if self.kind == "features" else image.read(Signal(self.kind, "feature"))
        values = values.transpose(1, 2) if self.kind.endswith("attention") else values
        valid = image.geometry.valid[..., None]
        middle = values.masked_fill(~valid, torch.nan).nanmedian(dim=1, keepdim=True).values
        return (values - middle).norm(dim=-1) * image.geometry.valid


def spotted(size: Size, spot: tuple[float, float]) -> Image.Image:
    """A dark image with a bright square around the spot."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    y, x, half = int(spot[0] * size[0]), int(spot[1] * size[1]), 3
    pixels[max(0, y - half) : y + half, max(0, x - half) : x + half] = 255
    return Image.fromarray(pixels)


def without_places(model: Any) -> Any:
    """The model with a vision tower that cannot tell where a patch is: dark patches are all alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("position_embedding", "positional_embedding", "pos_emb")):
                parameter.zero_()
        for name, buffer in model.named_buffers():
            if "inv_freq" in name:  # rotary embeddings
                buffer.zero_()
            if name.endswith("rope.pos_embed"):  # those of timm: sines, then cosines
                buffer.copy_((torch.arange(buffer.shape[-1]) * 2 >= buffer.shape[-1]).to(buffer))
            elif "freqs_ci" in name:  # the same as complex numbers
                buffer.fill_(1.0)
    return model


def token_of(geometry: TileGeometry, spot: tuple[float, float]) -> Tensor:
    """The token of each tile that shows a point of the image, bool `[tiles, tokens]`; the image fills its tiles."""
    rows, cols = geometry.token_grid
    y, x = torch.tensor(spot, dtype=torch.float64)
    regions = torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0]]), geometry.regions]).double()
    down = (y - regions[:, 0]) / (regions[:, 2] - regions[:, 0]) * rows
    across = (x - regions[:, 1]) / (regions[:, 3] - regions[:, 1]) * cols
    inside = (down >= 0) & (down < rows) & (across >= 0) & (across < cols)
    flat = down.floor().long().clamp(0, rows - 1) * cols + across.floor().long().clamp(0, cols - 1)
    shown: Tensor = torch.nn.functional.one_hot(flat, rows * cols).bool() & inside[:, None]
    return shown


def transposed(geometry: TileGeometry) -> TileGeometry:
    """The layout with rows and columns of every tile's tokens exchanged."""
    rows, cols = geometry.token_grid
    flat = torch.arange(geometry.tokens).view(rows, cols).t().flatten()
    place = geometry.packed.clamp(min=0)
    moved = place // geometry.tokens * geometry.tokens + flat[place % geometry.tokens]
    return replace(geometry, packed=torch.where(geometry.packed < 0, geometry.packed, moved))


def hits(selection: Selection, spot: tuple[float, float]) -> tuple[bool, bool]:
    """Whether a kept token of the base tile, and one of the sub-images, shows the spot."""
    shown = token_of(selection.geometry, spot)
    assert int(shown[0].sum()) == 1
    assert not selection.geometry.sub_images or int(shown[1:].sum()) == 1
    hit = shown & selection.kept
    return bool(hit[0].any()), not selection.geometry.sub_images or bool(hit[1:].any())
