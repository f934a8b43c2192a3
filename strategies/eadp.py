"""EADP: keeps tokens that represent the image content of the most specific words of the question.

Paper: Wang et al., "Combating Textual Noise and Redundancy: Entropy-Aware Dense Visual Token Pruning", ECCV 2026,
arXiv 2607.02484. Repository: SJTU-DeepVisionLab/EADP, commit e1a0880.

``c_ij`` is the negative cosine of text token ``i`` and visual token ``j`` in the shared embedding space of CLIP. The
distribution ``p_i = softmax_j(c_ij / tau)`` has the entropy ``h_i``. The dense score ``s^D`` is the mean of ``c_ij``
over the text tokens of low entropy, weighted by ``softmax(-h / gamma)``. The global score ``s^G`` is the negative
cosine of the full question. ``s = mu s^G + (1 - mu) s^D`` is rescaled to 0..1, smoothed by a 3 x 3 Gaussian and raised
to the power ``beta`` (Eq. 2 to 12). Tokens are then picked greedily to maximize ``sum_j s_j max(picked i) Sim_ij`` with
``Sim = (1 + cos) / 2`` over projected tokens (Eq. 13, 14). The budget of a tile is proportional to its sum of ``s``.

Paper and code disagree on two values. The share of text tokens is 0.5 in the base setting of the ablations, and 0.2 of
the padded length in the code. ``beta`` is "above 1" in the paper, and 1.0 for LLaVA in the code. This implementation
uses half of the real text tokens, without begin and end tokens as in the paper, and ``beta = 1``. Repaired: importance
is rescaled over the valid tokens of an image, padding uses no budget, and the budget is spent exactly. The release (its
code for LLaVA) uses every position of the text tower's input, including begin, end and padding tokens. It grants each
tile ``max(1, int(share * budget))`` tokens, and supports neither unpadding nor newline tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import AllocationPolicy, RelevancePolicy, SelectionPolicy, compute_relevance
from tokenprune.strategies.components.allocation import ScoreMassAllocation
from tokenprune.strategies.components.diversity import facility_location, select_per_tile
from tokenprune.strategies.components.relevance import SIGNS, rescale_to_unit


def smooth_maps(values: Tensor, token_grid: tuple[int, int], sigma: float) -> Tensor:
    """Smooth the map of each tile with a 3 x 3 Gaussian and mirrored borders, `[tiles, tokens]`.

    If the grid has a single row or column, return the values unchanged.

    Args:
        values: one number per token, `[tiles, tokens]`.
        token_grid: height x width of the tokens of a tile.
        sigma: standard deviation of the Gaussian in tokens.
    """
    if min(token_grid) < 2:  # reflection padding requires at least two rows and columns
        return values
    offsets = torch.tensor([-1.0, 0.0, 1.0], device=values.device)
    gaussian = (-offsets.square() / (2 * sigma**2)).exp()
    kernel = gaussian[:, None] * gaussian / gaussian.sum() ** 2
    maps = values.view(-1, 1, *token_grid)
    return F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="reflect"), kernel[None, None]).view_as(values)


@dataclass
class DenseTextRelevance(RelevancePolicy):
    """Computes the smoothed similarity of tokens to the question and to its words of low entropy (EADP).

    Args:
        layer: layer of the vision tower whose tokens are compared.
        temperature: temperature of the softmax over visual tokens (tau).
        weight_temperature: temperature of the weights of text tokens (gamma).
        word_share: share of the text tokens that are used, lowest entropy first (q).
        global_weight: weight of the similarity to the full question (mu), against the similarity to its words.
        sigma: standard deviation of the Gaussian in tokens.
        power: exponent of the result (beta).
        sign: ``"opposite"`` or ``"aligned"``, see `TextRelevance`.
        text: ``"words"`` of the question, or all ``"positions"`` of the text tower's input for each segment, as in the
            release.
        among: tokens of the softmax over visual tokens, which also define the range of the importance: ``"valid"``, or
            ``"all"`` including padding, as in the release.
    """

    layer: LayerChoice = "feature"
    temperature: float = 0.01
    weight_temperature: float = 0.01
    word_share: float = 0.5
    global_weight: float = 0.5
    sigma: float = 1.0
    power: float = 1.0
    sign: Literal["opposite", "aligned"] = "opposite"
    text: Literal["words", "positions"] = "words"
    among: Literal["valid", "all"] = "valid"

    @property
    def needs(self) -> Sequence[Signal]:
        """The tokens, the question and its words in the shared embedding space."""
        words = Signal("question_tokens" if self.text == "words" else "question_positions")
        return (Signal("aligned_features", self.layer), Signal("question"), words)

    def relevance(self, image: EncodedImage) -> Tensor:
        """Return the importance, `[tiles, tokens]`; 0..1 before the power is applied."""
        valid = image.geometry.valid.to(image.device)
        valid = valid if self.among == "valid" else torch.ones_like(valid)
        tokens = F.normalize(image.aligned_features(self.layer), dim=-1)
        sign = SIGNS[self.sign]
        global_similarity = sign * (tokens @ F.normalize(image.question(), dim=-1).T).mean(dim=-1)
        segments = image.question_tokens()[None] if self.text == "words" else image.question_positions()
        dense_similarity = torch.stack([self._dense_similarity(tokens, words, valid) for words in segments]).mean(dim=0)
        similarity = self.global_weight * global_similarity + (1 - self.global_weight) * dense_similarity
        importance = rescale_to_unit(similarity, valid) * valid
        return smooth_maps(importance, image.geometry.token_grid, self.sigma) ** self.power

    def _dense_similarity(self, tokens: Tensor, words: Tensor, valid: Tensor) -> Tensor:
        """Return the weighted similarity of tokens to the words of low entropy, `[tiles, tokens]`.

        Args:
            tokens: embeddings of unit length, `[tiles, tokens, shared]`.
            words: embeddings of the words of a segment, `[words, shared]`.
            valid: tokens of the softmax, bool `[tiles, tokens]`.
        """
        similarity = SIGNS[self.sign] * (tokens @ F.normalize(words, dim=-1).T)  # [tiles, tokens, words]
        log_p = (similarity / self.temperature).masked_fill(~valid[..., None], -torch.inf).log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p.masked_fill(~valid[..., None], 0.0)).sum(dim=1)  # [tiles, words]
        number = max(1, int(entropy.shape[1] * self.word_share))
        low_entropy = entropy.masked_fill(entropy > entropy.kthvalue(number, dim=1, keepdim=True)[0], torch.inf)
        weights = (-low_entropy / self.weight_temperature).softmax(dim=1)
        return (similarity * weights[:, None]).sum(dim=-1)


@dataclass
class FacilityLocationSelection(SelectionPolicy):
    """Keeps tokens that represent all tokens, weighted by relevance: facility location (EADP).

    Args:
        relevance: relevance policy that weights the represented tokens.
    """

    relevance: RelevancePolicy = field(default_factory=DenseTextRelevance)

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the relevance policy."""
        return self.relevance.needs

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance, `[tiles, tokens]`."""
        return compute_relevance(self.relevance, image)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by greedy facility location."""
        features = image.features
        return select_per_tile(
            candidates,
            budgets,
            lambda tile, indices, number: facility_location(features[tile, indices], scores[tile, indices], number),
        )


@dataclass
class EADP(ComponentReducer):
    """Keeps tokens that represent the image, weighted by similarity to the question and its words of low entropy.

    Repaired: the budget is spent exactly, only words of the question are used, and padding uses no budget.
    """

    published: ClassVar[str] = "ECCV 2026, arXiv 2607.02484"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=ScoreMassAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=FacilityLocationSelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, text_model: str | None = None) -> EADP:
        """Return EADP as published in code for LLaVA: it ignores unpadding, drops newline tokens and rounds down.

        Here each segment of a long question has its own begin and end tokens; segments of the release have none. If the
        images of a batch have different numbers of tiles, the release treats every tile as an image. Here the result of
        an image does not depend on other images.

        Args:
            budget: number of tokens that may enter the LLM, or their share; the release's "T per view" is
                ``Budget(T, per="tile")``.
            text_model: CLIP checkpoint of the vision tower.
        """
        # The release adds 1e-6 to the temperature of the weights.
        relevance = DenseTextRelevance(weight_temperature=0.01 + 1e-6, word_share=0.2, text="positions", among="all")
        return cls(
            budget,
            newlines="drop",
            text_model=text_model,
            allocation=ScoreMassAllocation(rounding="floor"),
            selection=FacilityLocationSelection(relevance),
            padding="ignore",
        )
