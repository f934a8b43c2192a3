"""The record of what an attached strategy did: selections, account and kept positions. It holds no model."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.account import HISTORY, TokenAccount
from tokenprune.adapter import LLMShape
from tokenprune.rewrite import Rows
from tokenprune.selection import Selection

DRAWABLE = 8
"""The first images of a run keep their pixels, scores and mixing matrices."""


class Run:
    """The record of the calls inside a block.

    Memory is bounded: the first `DRAWABLE` selections are complete, later ones are on the CPU without scores and mixing
    matrices, and only the last `HISTORY` selections are kept. Totals of the account cover all calls.

    Args:
        strategy: name of the strategy.
        llm: the shape of the language model.
        attention: where the attention comes from that the strategy reads as CLS attention; None if it reads none.
    """

    def __init__(self, strategy: str, llm: LLMShape, attention: str | None = None) -> None:
        self.strategy = strategy
        self.attention = attention
        """Where the attention comes from that the strategy reads as CLS attention; None if it reads none."""
        self.selections: list[Selection] = []
        """One selection per image, in the order of the calls."""
        self.account = TokenAccount(llm, attention=attention)
        """Tokens, cache bytes and FLOPs of all calls."""
        self.rows: Rows | None = None
        """The positions of the full prompt that remained in the last call; None before the first."""

    @property
    def drawable(self) -> int:
        """How many of the next images keep their pixels."""
        return max(0, DRAWABLE - self.account.image_count)

    def add(
        self,
        selections: Sequence[Selection],
        rows: Rows,
        lengths: Sequence[tuple[int, int]],
        second_look_flops: int = 0,
    ) -> None:
        """Record one call.

        Args:
            selections: one per image.
            rows: the positions that remain.
            lengths: tokens of each prompt row as (full, reduced), padding not counted.
            second_look_flops: FLOPs of a second model that read the images.
        """
        complete = self.drawable
        self.account.add(selections, lengths)
        self.account.second_look_flops += second_look_flops
        self.rows = rows.cpu()
        self.selections += [s if number < complete else s.compact() for number, s in enumerate(selections)]
        del self.selections[:-HISTORY]

    def __repr__(self) -> str:
        """Return the strategy and its account in one line."""
        return f"Run({self.strategy}: {self.account})"
