"""The mask oracle of LLaVA-NeXT."""

from __future__ import annotations

from typing import Any

import torch


def kept_mask(model: Any, inputs: Any, run: Any) -> torch.Tensor:
    """Return the mask of kept positions of the full prompt, from the selections only, bool `[rows, length]`."""
    kept = inputs["attention_mask"].bool().clone()
    kept[inputs["input_ids"] == model.config.image_token_id] = torch.cat([s.packed_mask() for s in run.selections])
    return kept


def oracle_inputs(model: Any, inputs: Any, run: Any, positions: str) -> dict[str, Any]:
    """Return the inputs of the full prompt with dropped positions masked and the position ids of the kept positions."""
    kept = kept_mask(model, inputs, run)
    ids = kept.long().cumsum(-1) - 1 if positions == "reindex" else torch.arange(kept.shape[1]).expand(kept.shape)
    return {**inputs, "attention_mask": kept.long(), "position_ids": ids.clamp(min=0)}
