"""Bipartite soft matching: merges the most similar pairs of patches of two sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.encoder.patches import PatchGroups


def match_bipartite(metric: Tensor, merged: int, has_cls: bool) -> PatchGroups:
    """Return the groups of ToMe's bipartite soft matching (arXiv 2210.09461, section 3; facebookresearch/ToMe).

    The sequence, with its CLS token, is split into sets A (even positions) and B (odd positions). The patches of A
    whose nearest patch of B is most similar are merged into it. The new sequence holds the unmerged patches of A and
    then B. As in the release, unmerged patches are ascending with a CLS token and by descending similarity without one.

    Args:
        metric: the vectors to compare, `[tiles, patches, width]`; compared by cosine similarity.
        merged: number of patches to merge, at most half of them.
        has_cls: whether a CLS token precedes the patches; it is never merged.
    """
    patches = metric.shape[1]
    merged = min(merged, patches // 2)
    metric = F.normalize(metric, dim=-1)
    first, second = (1, 0) if has_cls else (0, 1)
    similarity = metric[:, first::2] @ metric[:, second::2].transpose(1, 2)
    score, nearest = similarity.max(dim=-1)
    order = score.argsort(dim=1, descending=True)
    source, unmerged = order[:, :merged], order[:, merged:]
    unmerged = unmerged.sort(dim=1).values if has_cls else unmerged
    position = torch.arange(patches, device=metric.device).expand(len(metric), -1)
    set_a, set_b = position[:, first::2], position[:, second::2]
    kept = torch.cat([set_a.gather(1, unmerged), set_b], dim=1)
    number = position[:, : kept.shape[1]]
    group = torch.zeros_like(position).scatter(1, kept, number)
    target = number[:, unmerged.shape[1] :].gather(1, nearest.gather(1, source))
    return PatchGroups(kept, group.scatter(1, set_a.gather(1, source), target))
