"""Oracles of reduced models: the masked full prompt, generated ids, model state, and images with a bright spot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import pipeline

from tokenprune.adapter import find_adapter
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage, Signal
from tokenprune.reducer import ScoreReducer
from tokenprune.run import Run
from tokenprune.selection import Selection
from tokenprune.testing.families.base import Size


def generate(model: Any, inputs: Any, **options: Any) -> Tensor:
    """Generate six tokens. Image placeholders are suppressed, because a random model can generate them."""
    torch.manual_seed(0)
    suppress = [find_adapter(model).image_token_id]
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, suppress_tokens=suppress, **options)


def kept_mask(model: Any, inputs: Any, run: Run) -> Tensor:
    """Return the mask of kept positions of the full prompt, from the selections only, bool `[rows, length]`."""
    kept = inputs["attention_mask"].bool().clone()
    placeholders = inputs["input_ids"] == find_adapter(model).image_token_id
    kept[placeholders] = torch.cat([s.packed_mask() for s in run.selections])
    return kept


def oracle_inputs(model: Any, inputs: Any, run: Run, positions: str) -> dict[str, Any]:
    """Return the inputs of the full prompt with dropped positions masked and the position ids of the kept positions."""
    kept = kept_mask(model, inputs, run)
    adapter = find_adapter(model)
    is_counted = positions == "reindex"
    ids = adapter.count_position_ids(kept) if is_counted else adapter.compute_position_ids(inputs, for_generate=False)
    ids = ids.expand(*ids.shape[:-2], *kept.shape)
    return {**inputs, "attention_mask": kept.long(), "position_ids": ids}


def oracle_inputs_1d(model: Any, inputs: Any, run: Run, positions: str) -> dict[str, Any]:
    """Return the inputs of `oracle_inputs` with position ids counted without the adapter; for 1-D positions only."""
    kept = kept_mask(model, inputs, run)
    ids = kept.long().cumsum(-1) - 1 if positions == "reindex" else torch.arange(kept.shape[1]).expand(kept.shape)
    return {**inputs, "attention_mask": kept.long(), "position_ids": ids.clamp(min=0)}


def real_positions(model: Any, inputs: Any, run: Run, side: str = "left") -> Tensor:
    """Return the mask of non-padding positions of the shortened prompt, padded on a side, bool `[rows, width]`."""
    lengths = kept_mask(model, inputs, run).sum(1)
    columns = torch.arange(int(lengths.max()))
    return columns < lengths[:, None] if side == "right" else columns >= len(columns) - lengths[:, None]


def build_answer(model: Any, processor: Any, image: Image.Image, text: str) -> Callable[[], Any]:
    """Return a function that generates five tokens for an image and a text with a transformers pipeline."""
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 5, "suppress_tokens": [find_adapter(model).image_token_id]}

    def answer() -> Any:
        return pipe(images=[image], text=text, generate_kwargs=options, return_full_text=False)[0]["generated_text"]

    return answer


def collect_state(model: Any) -> list[Any]:
    """Return the hooks, configs and attributes of a model that an attached reducer can change."""
    modules = [
        (
            name,
            [list(hooks) for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)],
            id(getattr(module, "config", None)),
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    ]
    return [modules, vars(model).get("generate"), model.config.to_dict(), model.generation_config.to_dict()]


SPOTS = [(0.2, 0.85), (0.85, 0.2), (0.7, 0.6)]
"""Centers of the spot (y, x) as fractions of the image; off the diagonal, and never on the edge of a token."""


@dataclass
class OutlierReducer(ScoreReducer):
    """Keeps the tokens that differ most from the median of their tile."""

    kind: str = "features"

    @property
    def needs(self) -> list[Signal]:
        return [] if self.kind == "features" else [Signal(self.kind, "feature")]

    def score(self, image: EncodedImage) -> Tensor:
        values = image.features if self.kind == "features" else image.read(Signal(self.kind, "feature"))
        values = values.transpose(1, 2) if self.kind.endswith("attention") else values
        valid = image.geometry.valid[..., None]
        median = values.masked_fill(~valid, torch.nan).nanmedian(dim=1, keepdim=True).values
        return (values - median).norm(dim=-1) * image.geometry.valid


def draw_spot(size: Size, spot: tuple[float, float], half: int = 3) -> Image.Image:
    """Return a dark image with a bright square around the spot; `half` is half of its side in pixels."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    y, x = int(spot[0] * size[0]), int(spot[1] * size[1])
    pixels[max(0, y - half) : y + half, max(0, x - half) : x + half] = 255
    return Image.fromarray(pixels)


def remove_positions(model: Any) -> Any:
    """Zero the position embeddings of a model, so that its vision tower encodes all dark patches equally."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(key in name for key in ("position_embedding", "positional_embedding", "pos_emb")):
                parameter.zero_()
        for name, buffer in model.named_buffers():
            if "inv_freq" in name:  # rotary embeddings
                buffer.zero_()
            if name.endswith("rope.pos_embed"):  # rotary embeddings of timm: sines, then cosines
                buffer.copy_((torch.arange(buffer.shape[-1]) * 2 >= buffer.shape[-1]).to(buffer))
            elif "freqs_ci" in name:  # rotary embeddings as complex numbers
                buffer.fill_(1.0)
    return model


def locate_token(geometry: TileGeometry, spot: tuple[float, float]) -> Tensor:
    """Return a mask of the token of each tile that shows a point, bool `[tiles, tokens]`; the image fills its tiles."""
    rows, cols = geometry.token_grid
    y, x = torch.tensor(spot, dtype=torch.float64)
    regions = torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0]]), geometry.regions]).double()
    ys = (y - regions[:, 0]) / (regions[:, 2] - regions[:, 0]) * rows
    xs = (x - regions[:, 1]) / (regions[:, 3] - regions[:, 1]) * cols
    inside = (ys >= 0) & (ys < rows) & (xs >= 0) & (xs < cols)
    flat = ys.floor().long().clamp(0, rows - 1) * cols + xs.floor().long().clamp(0, cols - 1)
    mask: Tensor = torch.nn.functional.one_hot(flat, rows * cols).bool() & inside[:, None]
    return mask


def transpose_tokens(geometry: TileGeometry) -> TileGeometry:
    """Return the layout with rows and columns of every tile's tokens exchanged."""
    rows, cols = geometry.token_grid
    flat = torch.arange(geometry.tokens).view(rows, cols).t().flatten()
    index = geometry.packed.clamp(min=0)
    transposed = index // geometry.tokens * geometry.tokens + flat[index % geometry.tokens]
    return replace(geometry, packed=torch.where(geometry.packed < 0, geometry.packed, transposed))


def keeps_spot(selection: Selection, spot: tuple[float, float]) -> tuple[bool, bool]:
    """Return whether a kept token of the base tile shows the spot, and whether a kept token of the sub-images does."""
    spot_tokens = locate_token(selection.geometry, spot)
    assert int(spot_tokens[0].sum()) == 1
    assert not selection.geometry.sub_images or int(spot_tokens[1:].sum()) == 1
    kept = spot_tokens & selection.kept
    return bool(kept[0].any()), not selection.geometry.sub_images or bool(kept[1:].any())
