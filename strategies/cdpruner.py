"""CDPruner: tokens that have to do with the question and are unlike each other.

Paper: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
NeurIPS 2025, arXiv 2506.10967. Repository: Theia-4869/CDPruner, commit 9541616.

With ``r_i`` the negative cosine of token and question in CLIP's shared space, stretched to 0..1: greedy MAP inference
of a determinantal point process with the kernel ``L_ij = r_i r_j cos(f_i, f_j)`` over projected tokens ``f``. Repaired:
``r`` is stretched over the valid tokens of the own image (the release takes all images of a batch together), and
padding is never paid for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.image import EncodedImage, Signal
from tokenprune.policies import AllocationPolicy, RelevancePolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import determinantal, in_each_tile
from tokenprune.strategies.components.relevance import TextRelevance, rescaled


@dataclass
class ConditionalDiversitySelection(SelectionPolicy):
    """Keep relevant tokens that span a large volume (CDPruner).

    Args:
        relevance: how much each token has to do with the question.
        among: tokens over which relevance is stretched: ``"valid"`` or, as in the release, ``"all"`` with padding.
    """

    relevance: RelevancePolicy = field(default_factory=TextRelevance)
    among: Literal["valid", "all"] = "valid"

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the relevance."""
        return self.relevance.needs

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance, stretched over the image, `[tiles, tokens]`."""
        relevance = self.relevance.relevance(image)
        valid = image.geometry.valid.to(relevance.device)
        return rescaled(relevance, valid if self.among == "valid" else valid | True)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by greedy inference of the point process."""
        features = image.features
        return in_each_tile(candidates, budgets, lambda t, at, n: determinantal(features[t, at], scores[t, at], n))


@dataclass
class CDPruner(ComponentReducer):
    """Relevant tokens that are unlike each other: greedy inference of a determinantal point process.

    Repaired: an image decides for itself, and padding is never paid for.
    """

    published: ClassVar[str] = "NeurIPS 2025, arXiv 2506.10967"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=ConditionalDiversitySelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, text_model: str | None = None) -> CDPruner:
        """Return CDPruner as published in code: no unpadding in mind, no newlines.

        The release also forces a 2 x 2 tile grid, which is the processor's business, and stretches relevance over all
        images of a batch; here over all tiles of the image.

        Args:
            budget: tokens that may enter the LLM; the release's "T per view" is ``Budget(T, per="tile")``.
            text_model: the CLIP checkpoint that the vision tower comes from.
        """
        return cls(
            budget,
            newlines="drop",
            text_model=text_model,
            allocation=UniformAllocation(rounding="floor"),
            selection=ConditionalDiversitySelection(among="all"),
            padding="ignore",
        )
