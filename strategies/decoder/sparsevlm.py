"""SparseVLM: keeps the visual tokens that relevant text tokens attend to, at three cuts.

Paper: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025,
arXiv 2410.04417. Repository: Gumpest/SparseVLMs, commit 26a5f48 (versions 1.0 and 2.0).

Raters are the text tokens after the image that are more similar to the visual tokens than the mean text token, in the
input embeddings. ``relevance = mean over heads and raters of the attention in the layer before the cut``. Version 2
reads the heads with the largest attention of the raters, and divides the attention by the similarity of rotated unit
vectors. Version 1 reads all heads, and merges the most relevant 30 % of the dropped tokens into clusters.
Repaired: no division, which changes the sign of some attention values, and merged tokens are part of the budget.
The release appends the merged tokens; here each has the position of the center of its cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.decoder_reducer import ScheduledReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.reducer import ScoreReducer, score_candidates
from tokenprune.selection import Selection
from tokenprune.strategies.decoder._flat import unflatten_mask, unflatten_mixing

RELEASED_COUNTS = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Number of tokens after each cut, by version and mean number of tokens."""


def count_recycled(dropped: int) -> int:
    """Return how many of the dropped tokens are merged: 30 %, and one more."""
    return int(0.3 * dropped) + 1 if dropped else 0


def count_clusters(dropped: int) -> int:
    """Return the number of merged tokens: one for every ten recycled tokens, and one more."""
    return count_recycled(dropped) // 10 + 1 if dropped else 0


def find_clusters(features: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return cluster centers by density peaks, `[number]`, and the cluster of each token, `[tokens]`.

    Args:
        features: hidden states of the tokens, `[tokens, dim]`.
        number: number of clusters, and of the nearest neighbors that determine the density.
    """
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / features.shape[1] ** 0.5
    density = (-distances.square().topk(number, dim=1, largest=False)[0].mean(dim=1)).exp()
    is_denser = density[None] > density[:, None]
    separation = torch.where(is_denser, distances, distances.max()).amin(dim=1)
    centers = (separation * density).topk(number)[1]
    return centers, distances[:, centers].argmin(dim=1)


@dataclass
class SparseVLM(ScheduledReducer, ScoreReducer):
    """Keeps the visual tokens that relevant text tokens attend to, at three cuts.

    Args:
        heads: heads with the largest attention of the raters that are read: a ratio, or a number.
        rotary: ``"keep"`` reads the attention as it is; ``"divide"`` divides it by the similarity of rotated unit
            vectors, as version 2 of the release.
        merging: merged tokens: ``"none"``, ``"counted"`` in the budget, or ``"added"`` to it, as version 1 of the
            release.
    """

    published: ClassVar[str] = "ICML 2025, arXiv 2410.04417"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    schedule: tuple[tuple[int | float, int | float], ...] = field(
        default=((2 / 32, 0.52), (6 / 32, 0.35), (15 / 32, 0.2)), kw_only=True
    )
    heads: int | float = field(default=14 / 32, kw_only=True)
    rotary: Literal["keep", "divide"] = field(default="keep", kw_only=True)
    merging: Literal["none", "counted", "added"] = field(default="none", kw_only=True)

    @classmethod
    def release(cls, tokens: int = 192, version: Literal[1, 2] = 2) -> SparseVLM:
        """Return SparseVLM as published in code, with its numbers of tokens for 576 tokens in 32 layers.

        Args:
            tokens: mean number of tokens over the layers: 192, 128, 96 or 64.
            version: version of the release.

        Raises:
            ValueError: if the release has no numbers for the version and the number of tokens.
        """
        counts = RELEASED_COUNTS.get(version, {}).get(tokens)
        if counts is None:
            raise ValueError(
                f"SparseVLM has no version {version!r} with {tokens!r} tokens; use 1 or 2; 192, 128, 96, 64"
            )
        schedule = tuple(zip((2, 6, 15), counts, strict=True))
        if version == 1:
            return cls(schedule=schedule, heads=1.0, merging="added")
        return cls(schedule=schedule, heads=14, rotary="divide")

    @property
    def needs(self) -> Sequence[Signal]:
        """The attention of the text, and the input embeddings of text and visual tokens."""
        needs = [Signal("text_attention", "before"), Signal("llm_hidden", 0), Signal("text_hidden", 0)]
        return [*needs, Signal("rotary_similarity", "before")] if self.rotary == "divide" else needs

    def find_raters(self, image: EncodedImage) -> Tensor:
        """Return the mask of the text tokens that are more similar to the visual tokens than the mean, `[text]`."""
        hidden = image.llm_hidden(0).flatten(0, 1)[image.geometry.to(image.device).token_order]
        scores = (hidden @ image.text_hidden(0).T).softmax(dim=1).mean(dim=0)
        is_rater = scores > scores.mean()
        return is_rater | ~is_rater.any()  # equal scores: every text token is a rater

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance of each token, `[tiles, tokens]`."""
        valid = image.geometry.to(image.device).valid
        attention = image.text_attention("before")
        if self.rotary == "divide":
            attention = attention / image.rotary_similarity("before")
        raters = self.find_raters(image).to(attention.dtype)
        rows = (attention * (raters / raters.sum())[:, None]).sum(dim=2).masked_fill(~valid[:, None], 0)
        total = rows.shape[1]
        number = min(total, self.heads if isinstance(self.heads, int) else max(1, round(self.heads * total)))
        heads = rows.sum(dim=(0, 2)).argsort(descending=True, stable=True)[:number]
        return rows.index_select(1, heads).mean(dim=1)

    def select(self, image: EncodedImage) -> Selection:
        """Keep the most relevant tokens, and the clusters of dropped tokens if they are merged."""
        if self.merging == "none":
            return super().select(image)
        geometry = image.geometry.to(image.device)
        total, features = geometry.valid_tokens, image.features.flatten(0, 1)[geometry.token_order].float()
        scores = score_candidates(self, image, geometry.valid)
        order = scores.flatten()[geometry.token_order].argsort(descending=True, stable=True)

        def merge(number: int) -> tuple[Tensor, Tensor]:
            """Return the mask of the tokens, `[valid]`, and their mixtures, `[valid, valid]`."""
            attended = number
            while self.merging == "counted" and attended and attended + count_clusters(total - attended) > number:
                attended -= 1
            recycled = order[attended:][: count_recycled(total - attended)]
            clusters = count_clusters(total - attended)
            clusters = min(clusters, number) if self.merging == "counted" else clusters
            weights = torch.eye(total, device=order.device)
            kept = torch.zeros(total, dtype=torch.bool, device=order.device)
            kept[order[:attended]] = True
            if clusters:
                centers, cluster = find_clusters(features[recycled], clusters)
                members = F.one_hot(cluster, clusters).T.to(weights.dtype)
                rows = weights.new_zeros(clusters, total).index_copy(1, recycled, members)
                weights[recycled[centers]] = rows / rows.sum(dim=1, keepdim=True).clamp(min=1)
                kept[recycled[centers]] = True
            return kept, weights

        def select_tokens(number: int) -> tuple[Tensor, Tensor]:
            kept = unflatten_mask(merge(number)[0], geometry)
            return kept, kept.sum(dim=1)

        selection = self.select_within_budget(image, select_tokens, scores)
        asked = selection.kept_tokens if self.merging == "added" else selection.asked
        number = selection.asked if self.merging == "added" else selection.kept_tokens
        kept, weights = merge(min(number, total))
        return replace(selection, asked=asked, mixing=unflatten_mixing(weights[kept], geometry))
