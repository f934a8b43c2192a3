"""VisionDrop: keeps the tokens that other visual tokens attend to, and merges dropped tokens, at three cuts.

Repository: Ruixxxx/VisionDrop, commit f7a9444 (AAAI 2026).

``score = mean over heads and visual queries of the attention among visual tokens``, computed with the weights of the
layer of the cut. Contextual tokens are evenly spaced among the remaining tokens. Each further token is merged into the
contextual token with the most similar key. Cuts at layers 8, 16 and 24 of 32. The release adds the mean of the members
to a contextual token, and puts contextual tokens last. Repaired: a contextual token is the mean of itself and its
members, it keeps its position, and it is part of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.decoder_reducer import ScheduledReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.reducer import ScoreReducer, score_candidates
from tokenprune.selection import Selection
from tokenprune.strategies.components.selection import sample_mask
from tokenprune.strategies.decoder._flat import unflatten_mask, unflatten_mixing


@dataclass
class VisionDrop(ScheduledReducer, ScoreReducer):
    """Keeps the tokens that other visual tokens attend to, and merges dropped tokens, at three cuts.

    Args:
        share: share of the budget for contextual tokens.
    """

    published: ClassVar[str] = "AAAI 2026"

    schedule: tuple[tuple[int | float, int | float], ...] = field(
        default=((0.25, 0.5), (0.5, 0.25), (0.75, 0.125)), kw_only=True
    )
    share: float = field(default=10 / 64, kw_only=True)

    @property
    def needs(self) -> Sequence[Signal]:
        """The attention among visual tokens and their keys in the layer of the cut."""
        return (Signal("asked_visual_attention"), Signal("asked_keys"))

    def score(self, image: EncodedImage) -> Tensor:
        """Return the mean attention over heads, `[tiles, tokens]`."""
        return image.asked_visual_attention().mean(dim=1)

    def select(self, image: EncodedImage) -> Selection:
        """Keep the most attended tokens, and contextual tokens that dropped tokens are merged into."""
        geometry = image.geometry.to(image.device)
        total = geometry.valid_tokens
        keys = F.normalize(image.asked_keys().mean(dim=1).flatten(0, 1)[geometry.token_order], dim=-1)
        scores = score_candidates(self, image, geometry.valid)
        order = scores.flatten()[geometry.token_order].argsort(descending=True, stable=True)

        def choose(number: int) -> tuple[Tensor, Tensor]:
            """Return the masks of the dominant and of the contextual tokens, bool `[valid]` each."""
            contextual = round(number * self.share) if number < total else 0
            dominant = torch.zeros(total, dtype=torch.bool, device=order.device)
            dominant[order[: number - contextual]] = True
            count = torch.full((1, 1), contextual, device=order.device)
            return dominant, ~dominant & sample_mask(~dominant[None], count, "even")[0]

        def select_tokens(number: int) -> tuple[Tensor, Tensor]:
            dominant, is_target = choose(number)
            kept = unflatten_mask(dominant | is_target, geometry)
            return kept, kept.sum(dim=1)

        selection = self.select_within_budget(image, select_tokens, scores)
        dominant, is_target = choose(selection.kept_tokens)
        kept, weights = dominant | is_target, torch.eye(total, device=order.device)
        if bool(is_target.any()):
            target = (keys @ keys.T).masked_fill(~is_target, -torch.inf).argmax(dim=1)
            members = F.one_hot(target, total).T.to(weights.dtype) * ~kept
            weights = (weights + members) / (1 + members.sum(dim=1, keepdim=True))
        return replace(selection, mixing=unflatten_mixing(weights[kept], geometry))
