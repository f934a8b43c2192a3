"""A call of a model with its images reduced, and the numbers of the call that are recorded."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenprune.encoder.patches import PatchRecord
from tokenprune.rewrite import PromptSummary, Rows
from tokenprune.selection import Selection


@dataclass(frozen=True, eq=False)
class PreparedCall:
    """One call of a model with its images reduced.

    Args:
        inputs: keyword inputs of `forward` or `generate`.
        rows: the positions of the full prompt that remain.
        selections: one selection per image.
        is_shortened: whether the prompt differs from the prompt of the caller.
        contexts: the contexts to hold while the model runs.
        features: the features of each image that enter the LLM, `[kept, dim]` each; None if the model itself encodes
            the images of `inputs`.
    """

    inputs: dict[str, Any]
    rows: Rows
    selections: list[Selection]
    is_shortened: bool = False
    contexts: tuple[AbstractContextManager[Any], ...] = ()
    features: list[Tensor] | None = None

    @property
    def is_reduced(self) -> bool:
        """Whether the tokens of an image were dropped, merged or reordered."""
        return not all(selection.is_identity for selection in self.selections)

    @contextmanager
    def enter_contexts(self) -> Iterator[None]:
        """Hold the contexts of the call inside the block."""
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            yield


@dataclass(frozen=True, eq=False)
class CallRecord:
    """The numbers of one call, all on the host.

    Args:
        selections: one selection per image, with counts.
        prompts: numbers about the full prompts.
        row_of_image: the prompt row of each image.
        emptied: number of dropped text positions of each row; empty if none are dropped.
        saliency_flops: FLOPs of the saliency model.
        patches: the patches that remained in the vision tower; None if no strategy acted inside it.
    """

    selections: list[Selection]
    prompts: PromptSummary
    row_of_image: Sequence[int]
    emptied: Sequence[int]
    saliency_flops: int
    patches: PatchRecord | None = None

    @property
    def reduced_lengths(self) -> list[int]:
        """Number of tokens of each row of the reduced prompt."""
        lengths = list(map(operator.sub, self.prompts.tokens, self.prompts.placeholders))
        for row, number in enumerate(self.emptied):
            lengths[row] -= number
        for row, selection in zip(self.row_of_image, self.selections, strict=True):
            lengths[row] += selection.kept_tokens + selection.kept_newlines
        return lengths
