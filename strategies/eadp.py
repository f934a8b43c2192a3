"""EADP: tokens that represent what the question's telling words point at.

Paper: Wang et al., "Combating Textual Noise and Redundancy: Entropy-Aware Dense Visual Token Pruning", ECCV 2026,
arXiv 2607.02484. Repository: SJTU-DeepVisionLab/EADP, commit e1a0880.

With ``c_ij`` the negative cosine of text token ``i`` and visual token ``j`` in CLIP's shared space: ``p_i =
softmax_j(c_ij / tau)`` has the entropy ``h_i``; text tokens of low entropy count, weighted by ``softmax(-h / gamma)``:
``s^D``; with ``s^G`` the negative cosine of the whole question, ``s = mu s^G + (1 - mu) s^D`` is stretched to 0..1,
smoothed by a 3 x 3 Gaussian and raised to ``beta`` (Eq. 2 to 12). Tokens are then picked greedily to maximize
``sum_j s_j max(picked i) Sim_ij`` with ``Sim = (1 + cos) / 2`` over projected tokens (Eq. 13, 14). Tiles share the
budget by the sum of ``s``.

Paper and code disagree on the share of text tokens (0.5 in the ablations' base, 0.2 of the padded length in the code)
and on ``beta`` ("above 1", 1.0 for LLaVA in the code). Taken here: half of the real text tokens, begin and end left out
as the paper says, and ``beta = 1``. Repaired: importance is stretched over the valid tokens of an image, padding is
never paid for, and the budget is spent exactly. The release (its code for LLaVA) counts every position of the text
tower's input, begin, end and padding among them, gives each tile ``max(1, int(share * budget))`` tokens, and knows
neither unpadding nor newlines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import AllocationPolicy, RelevancePolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import ScoreMassAllocation
from tokenprune.strategies.components.diversity import facility_location, in_each_tile
from tokenprune.strategies.components.relevance import SIGNS, rescaled


def smoothed(values: Tensor, token_grid: tuple[int, int], sigma: float) -> Tensor:
    """Smooth the map of each tile with a 3 x 3 Gaussian; the border is mirrored.

    Args:
        values: one number per token, `[tiles, tokens]`.
        token_grid: height x width of the tokens of a tile.
        sigma: width of the Gaussian in tokens.
    """
    if min(token_grid) < 2:  # a single row or column has nothing to mirror
        return values
    steps = torch.tensor([-1.0, 0.0, 1.0], device=values.device)
    bell = (-steps.square() / (2 * sigma**2)).exp()
    kernel = bell[:, None] * bell / bell.sum() ** 2
    maps = values.view(-1, 1, *token_grid)
    return F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="reflect"), kernel[None, None]).view_as(values)


@dataclass
class DenseTextRelevance(RelevancePolicy):
    """Likeness of tokens to the telling words of the question and to the whole of it, smoothed (EADP).

    Args:
        layer: layer of the vision tower whose tokens are compared.
        temperature: of the softmax over visual tokens (tau).
        sharpness: temperature of the weights of text tokens (gamma).
        words: share of the text tokens that count, those of the lowest entropy (q).
        whole: share of the question as a whole (mu).
        sigma: width of the Gaussian in tokens.
        power: exponent of the result (beta).
        sign: ``"opposite"`` or ``"aligned"``, see `TextRelevance`.
        text: ``"words"`` of the question, or as in the release all ``"positions"`` of the text tower's input, segment
            by segment.
        among: tokens over which words are spread and importance is stretched: ``"valid"`` or, as in the release,
            ``"all"`` with padding.
    """

    layer: LayerChoice = "feature"
    temperature: float = 0.01
    sharpness: float = 0.01
    words: float = 0.5
    whole: float = 0.5
    sigma: float = 1.0
    power: float = 1.0
    sign: Literal["opposite", "aligned"] = "opposite"
    text: Literal["words", "positions"] = "words"
    among: Literal["valid", "all"] = "valid"

    @property
    def needs(self) -> Sequence[Signal]:
        """Tokens, question and its words in the shared space."""
        words = Signal("question_tokens" if self.text == "words" else "question_positions")
        return (Signal("aligned_features", self.layer), Signal("question"), words)

    def relevance(self, image: EncodedImage) -> Tensor:
        """Return the importance, `[tiles, tokens]`; 0..1 before the power."""
        valid = image.geometry.valid.to(image.device)
        valid = valid if self.among == "valid" else torch.ones_like(valid)
        tokens = F.normalize(image.aligned_features(self.layer), dim=-1)
        sign = SIGNS[self.sign]
        whole = sign * (tokens @ F.normalize(image.question(), dim=-1).T).mean(dim=-1)
        segments = image.question_tokens()[None] if self.text == "words" else image.question_positions()
        dense = torch.stack([self._dense(tokens, segment, valid) for segment in segments]).mean(dim=0)
        importance = rescaled(self.whole * whole + (1 - self.whole) * dense, valid) * valid
        return smoothed(importance, image.geometry.token_grid, self.sigma) ** self.power

    def _dense(self, tokens: Tensor, segment: Tensor, valid: Tensor) -> Tensor:
        """Return the likeness of tokens to the telling words, `[tiles, tokens]`.

        Args:
            tokens: of unit length, `[tiles, tokens, shared]`.
            segment: words, `[words, shared]`.
            valid: tokens that words are spread over, bool `[tiles, tokens]`.
        """
        words = SIGNS[self.sign] * (tokens @ F.normalize(segment, dim=-1).T)  # [tiles, tokens, words]
        log_p = (words / self.temperature).masked_fill(~valid[..., None], -torch.inf).log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p.masked_fill(~valid[..., None], 0.0)).sum(dim=1)  # [tiles, words]
        number = max(1, int(entropy.shape[1] * self.words))
        telling = entropy.masked_fill(entropy > entropy.kthvalue(number, dim=1, keepdim=True)[0], torch.inf)
        weights = (-telling / self.sharpness).softmax(dim=1)
        return (words * weights[:, None]).sum(dim=-1)


@dataclass
class FacilityLocationSelection(SelectionPolicy):
    """Keep tokens that together resemble all tokens, the relevant ones most (facility location; EADP).

    Args:
        relevance: how much it matters that a token is represented.
    """

    relevance: RelevancePolicy = field(default_factory=DenseTextRelevance)

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the relevance."""
        return self.relevance.needs

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance, `[tiles, tokens]`."""
        return self.relevance.relevance(image)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by greedy facility location."""
        features = image.features
        return in_each_tile(candidates, budgets, lambda t, at, n: facility_location(features[t, at], scores[t, at], n))


@dataclass
class EADP(ComponentReducer):
    """Tokens that represent what the telling words of the question point at.

    Repaired: the budget is spent exactly, words alone count, and padding is never paid for.
    """

    published: ClassVar[str] = "ECCV 2026, arXiv 2607.02484"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=ScoreMassAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=FacilityLocationSelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, text_model: str | None = None) -> EADP:
        """Return EADP as published in code for LLaVA: no unpadding in mind, no newlines, rounded down.

        A long question is cut into segments with a begin and an end of their own here; the release cuts without. In a
        batch of images with different numbers of tiles, the release treats every tile as an image; here an image
        decides for itself.

        Args:
            budget: tokens that may enter the LLM; the release's "T per view" is ``Budget(T, per="tile")``.
            text_model: the CLIP checkpoint that the vision tower comes from.
        """
        # The release adds 1e-6 to the temperature of the weights.
        relevance = DenseTextRelevance(sharpness=0.01 + 1e-6, words=0.2, text="positions", among="all")
        return cls(
            budget,
            newlines="drop",
            text_model=text_model,
            allocation=ScoreMassAllocation(rounding="floor"),
            selection=FacilityLocationSelection(relevance),
            padding="ignore",
        )
