"""The record of an attached strategy: selections, account and kept positions. It holds no reference to the model."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.account import HISTORY, TokenAccount
from tokenprune.adapter import LLMShape
from tokenprune.rewrite import Rows
from tokenprune.selection import Selection

DRAWABLE = 8
"""The number of first images of a run that keep their pixels, scores and mixing matrices."""


class Run:
    """The record of the calls inside a block.

    Memory is bounded. The first `DRAWABLE` selections are complete; later selections are stored on the CPU without
    scores and mixing matrices. Only the last `HISTORY` selections are kept. Totals of the account cover all calls.

    Args:
        strategy: name of the strategy.
        llm: the shape of the language model.
        attention: the source that the strategy reads as CLS attention; None if it reads no CLS attention.
    """

    def __init__(self, strategy: str, llm: LLMShape, attention: str | None = None) -> None:
        self.strategy = strategy
        self.attention = attention
        """The source that the strategy reads as CLS attention; None if it reads no CLS attention."""
        self.selections: list[Selection] = []
        """One selection per image, in the order of the calls."""
        self.account = TokenAccount(llm, attention=attention)
        """Tokens, cache bytes and FLOPs of all calls."""
        self.rows: Rows | None = None
        """The positions of the full prompt that remained in the last call; None before the first call."""

    @property
    def drawable(self) -> int:
        """Number of following images that keep their pixels."""
        return max(0, DRAWABLE - self.account.image_count)

    def add(
        self,
        selections: Sequence[Selection],
        rows: Rows,
        lengths: Sequence[tuple[int, int]],
        saliency_flops: int = 0,
    ) -> None:
        """Record one call.

        Args:
            selections: one selection per image.
            rows: the positions of the full prompt that remain.
            lengths: number of tokens of each prompt row without padding, as (full, reduced).
            saliency_flops: FLOPs of the saliency model.
        """
        complete = self.drawable
        self.account.add(selections, lengths)
        self.account.saliency_flops += saliency_flops
        self.rows = rows.cpu()
        self.selections += [s if number < complete else s.compact() for number, s in enumerate(selections)]
        del self.selections[:-HISTORY]

    def __repr__(self) -> str:
        """Return the strategy and its account in one line."""
        return f"Run({self.strategy}: {self.account})"
