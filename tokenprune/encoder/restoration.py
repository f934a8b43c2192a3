"""States of dropped patches, restored from the changes of kept patches that were near them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DroppedPatches:
    """The patches that a step dropped, with the states from which they are restored.

    Args:
        index: position of each dropped patch among all patches of its tile, `[tiles, dropped]`.
        states: states of the dropped patches at the step, `[tiles, dropped, width]`.
        kept_states: states of the kept patches at the step, `[tiles, kept, width]`.
        neighbors: numbers of the kept patches whose changes restore each dropped patch, `[tiles, dropped, neighbors]`;
            -1 if a patch has fewer neighbors.
    """

    index: Tensor
    states: Tensor
    kept_states: Tensor
    neighbors: Tensor


def list_dropped(kept: Tensor, patches: int) -> Tensor:
    """Return the patches that are not kept, ascending, `[tiles, dropped]`.

    Args:
        kept: the kept patches of each tile, `[tiles, kept]`.
        patches: number of patches of a tile.
    """
    mask = torch.ones(len(kept), patches, dtype=torch.uint8, device=kept.device).scatter(1, kept, 0)
    return mask.argsort(dim=1, descending=True, stable=True)[:, : patches - kept.shape[1]]


def nearest_kept(states: Tensor, kept: Tensor, neighbors: int) -> Tensor:
    """Return the numbers in `kept` of the kept patches nearest to each dropped patch, `[tiles, dropped, neighbors]`.

    Args:
        states: states of all patches, `[tiles, patches, width]`; compared by Euclidean distance.
        kept: the kept patches of each tile, `[tiles, kept]`.
        neighbors: number of neighbors, at most the kept patches.
    """
    dropped = list_dropped(kept, states.shape[1])
    first, second = (
        states.gather(1, index[..., None].expand(-1, -1, states.shape[-1])).float() for index in (dropped, kept)
    )
    return torch.cdist(first, second).topk(min(neighbors, kept.shape[1]), dim=-1, largest=False).indices


def restore_dropped(dropped: DroppedPatches, kept_states: Tensor) -> Tensor:
    """Return the states of dropped patches: their last state and the mean change of their neighbors since then.

    Sums are float32, because sums in half precision are inexact.

    Args:
        dropped: the dropped patches.
        kept_states: the current states of the kept patches, `[tiles, kept, width]`.

    Returns:
        The states, `[tiles, dropped, width]`.
    """
    tiles, kept, width = kept_states.shape
    change = F.pad((kept_states.float() - dropped.kept_states.float()).flatten(0, 1), (0, 0, 0, 1))
    first = kept * torch.arange(tiles, device=change.device)[:, None, None]
    index = torch.where(dropped.neighbors < 0, tiles * kept, dropped.neighbors + first)
    mean = F.embedding_bag(index.flatten(0, 1), change, mode="mean", padding_idx=tiles * kept)
    return (dropped.states.float() + mean.view(tiles, -1, width)).to(kept_states.dtype)
