"""CDPruner: keeps tokens that are relevant to the question and differ from each other.

Paper: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
NeurIPS 2025, arXiv 2506.10967. Repository: Theia-4869/CDPruner, commit 9541616.

``r_i`` is the negative cosine of token and question in the shared embedding space of CLIP, rescaled to 0..1. Tokens are
selected by greedy MAP inference of a determinantal point process with the kernel ``L_ij = r_i r_j cos(f_i, f_j)`` over
projected tokens ``f``. Repaired: ``r`` is rescaled over the valid tokens of each image (the release rescales it over
all images of a batch), and padding uses no budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.policies import AllocationPolicy, RelevancePolicy, SelectionPolicy, compute_relevance
from tokenprune.strategies.components.allocation import UniformAllocation
from tokenprune.strategies.components.diversity import greedy_dpp, select_per_tile
from tokenprune.strategies.components.relevance import TextRelevance, rescale_to_unit


@dataclass
class ConditionalDiversitySelection(SelectionPolicy):
    """Keeps relevant, mutually different tokens by a determinantal point process (CDPruner).

    Args:
        relevance: relevance policy that scores the tokens.
        among: tokens that define the range of the relevance: ``"valid"``, or ``"all"`` including padding, as in the
            release.
    """

    relevance: RelevancePolicy = field(default_factory=TextRelevance)
    among: Literal["valid", "all"] = "valid"

    @property
    def is_exact(self) -> bool:
        """Whether the budget of each tile is spent in full."""
        return True

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals of the relevance policy."""
        return self.relevance.needs

    def score(self, image: EncodedImage) -> Tensor:
        """Return the relevance, rescaled to 0..1 over the image, `[tiles, tokens]`."""
        relevance = compute_relevance(self.relevance, image)
        valid = image.geometry.valid.to(relevance.device)
        return rescale_to_unit(relevance, valid if self.among == "valid" else valid | True)

    def pick(self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor) -> Tensor:
        """Keep tokens by greedy inference of the determinantal point process."""
        features = image.features
        return select_per_tile(
            candidates,
            budgets,
            lambda tile, indices, number: greedy_dpp(features[tile, indices], scores[tile, indices], number),
        )


@dataclass
class CDPruner(ComponentReducer):
    """Keeps relevant tokens that differ from each other, by greedy inference of a determinantal point process.

    Repaired: the result of an image does not depend on other images of the batch, and padding uses no budget.
    """

    published: ClassVar[str] = "NeurIPS 2025, arXiv 2506.10967"
    parity: ClassVar[str] = "release(): 6/6 official cases"

    allocation: AllocationPolicy = field(default_factory=UniformAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=ConditionalDiversitySelection, kw_only=True)

    @classmethod
    def release(cls, budget: int | float | str | Budget = 0.2, text_model: str | None = None) -> CDPruner:
        """Return CDPruner as published in code: it ignores unpadding and drops newline tokens.

        The release also forces a 2 x 2 tile grid. That part belongs to the processor and is not included. The release
        rescales relevance over all images of a batch; here it is rescaled over all tiles of the image.

        Args:
            budget: number of tokens that may enter the LLM, or their share; the release's "T per view" is
                ``Budget(T, per="tile")``.
            text_model: CLIP checkpoint of the vision tower.
        """
        return cls(
            budget,
            newlines="drop",
            text_model=text_model,
            allocation=UniformAllocation(rounding="floor"),
            selection=ConditionalDiversitySelection(among="all"),
            padding="ignore",
        )
