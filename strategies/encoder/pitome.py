"""PiToMe: merges patches of large groups of similar patches, and protects patches that are alone.

Paper: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024, arXiv 2405.16148.
Repository: hchautran/PiToMe, commit 550b5de.

``energy = mean over patches of elu(similarity - margin)`` with the margin ``0.9 - 0.9 * layer / layers``. Of the
patches with the largest energies, every second is merged into its most similar patch among the others. The release
passes no sizes to attention. Repaired: proportional attention, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.encoder.patches import PatchGroups
from tokenprune.encoder_reducer import PatchMergeReducer
from tokenprune.image import EncodedImage, Signal


@dataclass
class PiToMe(PatchMergeReducer):
    """Merges patches of large groups of similar patches in every layer of the vision tower."""

    published: ClassVar[str] = "NeurIPS 2024, arXiv 2405.16148"
    parity: ClassVar[str] = "match_energy: 6/6 official cases"

    @property
    def needs(self) -> Sequence[Signal]:
        """The keys of the layer."""
        return (Signal("keys"),)

    def metric(self, image: EncodedImage) -> Tensor:
        """Return the head mean of the keys, `[tiles, patches, head_dim]`."""
        return image.keys("feature").mean(dim=1)

    def match(self, image: EncodedImage, metric: Tensor, number: int) -> PatchGroups:
        """Return the groups by energy, with a margin that falls with the depth of the layer."""
        margin = 0.9 - 0.9 * image.feature_layer / image.layers
        return match_energy(metric, metric.shape[1] - number, margin)


def match_energy(metric: Tensor, merged: int, margin: float) -> PatchGroups:
    """Return the groups of PiToMe (equations 4 and 5 of the paper).

    Args:
        metric: the vectors to compare, `[tiles, patches, width]`; compared by cosine similarity.
        merged: number of patches to merge, at most half of them.
        margin: similarity from which on a neighbor adds to the energy.
    """
    merged = min(merged, metric.shape[1] // 2)
    metric = F.normalize(metric, dim=-1)
    similarity = metric @ metric.transpose(1, 2)
    order = F.elu(similarity - margin).mean(dim=-1).argsort(dim=1, descending=True)
    source, target, protected = order[:, 0 : 2 * merged : 2], order[:, 1 : 2 * merged : 2], order[:, 2 * merged :]
    width = similarity.shape[1]
    pairs = similarity.gather(1, source[..., None].expand(-1, -1, width))
    pairs = pairs.gather(2, target[:, None].expand(-1, merged, -1))
    kept = torch.cat([protected, target], dim=1)
    number = torch.arange(width, device=metric.device).expand(len(metric), -1)
    group = torch.zeros_like(number).scatter(1, kept, number[:, : kept.shape[1]])
    if merged:
        group = group.scatter(1, source, protected.shape[1] + pairs.argmax(dim=-1))
    return PatchGroups(kept, group)
