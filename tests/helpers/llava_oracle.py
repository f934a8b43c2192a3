"""The mask oracle of LLaVA-NeXT."""

from __future__ import annotations

from typing import Any

import torch


def kept_mask(model: Any, inputs: Any, run: Any) -> torch.Tensor:
    """Which positions of the full prompt stay, from the selections alone, bool `[rows, length]`."""
    stays = inputs["attention_mask"].bool().clone()
    stays[inputs["input_ids"] == model.config.image_token_id] = torch.cat([s.packed_mask() for s in run.selections])
    return stays


def oracle_inputs(model: Any, inputs: Any, run: Any, positions: str) -> dict[str, Any]:
    """The full prompt with dropped positions masked, and the position ids that the kept ones have."""
    stays = kept_mask(model, inputs, run)
    ids = stays.long().cumsum(-1) - 1 if positions == "reindex" else torch.arange(stays.shape[1]).expand(stays.shape)
    return {**inputs, "attention_mask": stays.long(), "position_ids": ids.clamp(min=0)}
