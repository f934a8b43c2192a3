"""Compares strategies on the inputs of one `generate` call: answers, tokens, cache, FLOPs and time in one table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tokenprune.budget import format_budget
from tokenprune.display import align_columns, format_table
from tokenprune.pipeline import call_generate
from tokenprune.run import Run

if TYPE_CHECKING:
    from tokenprune.reducer import TokenReducer

COLUMNS = ("strategy", "budget", "kept", "tokens per layer", "KV cache", "prefill FLOPs", "seconds")
"""Headings of the table; a column of answers follows if there are any."""


@dataclass(frozen=True)
class ComparisonRow:
    """The results of one strategy.

    Args:
        strategy: label of the strategy.
        budget: its budget as text.
        kept: visual tokens that entered the LLM.
        valid: visual tokens that enter the LLM without reduction.
        average_tokens: visual tokens of a prompt, averaged over the layers of the LLM.
        kv_ratio: bytes of the KV cache after prefill, relative to all tokens.
        flops_ratio: FLOPs of prefill in the LLM, relative to all tokens.
        seconds: time of one `generate` call, with the vision tower.
        answers: the new text of each prompt; empty without a processor.
    """

    strategy: str
    budget: str
    kept: int
    valid: int
    average_tokens: float
    kv_ratio: float
    flops_ratio: float
    seconds: float
    answers: tuple[str, ...] = ()

    def format(self) -> list[str]:
        """Return the texts of `COLUMNS` and, if there are answers, their text."""
        texts = [
            self.strategy,
            self.budget,
            f"{self.kept} of {self.valid}",
            f"{self.average_tokens:.1f}",
            f"{self.kv_ratio:.1%}",
            f"{self.flops_ratio:.1%}",
            f"{self.seconds:.3f}",
        ]
        return [*texts, " | ".join(self.answers)] if self.answers else texts


@dataclass(frozen=True, eq=False)
class Comparison:
    """The results of several strategies as a table. Jupyter displays it; `print` shows plain text.

    Args:
        rows: one row per strategy, in the order of the call.
        runs: the record of each strategy: ``comparison.runs[0].overlay()`` draws the kept tokens.
    """

    rows: Sequence[ComparisonRow]
    runs: Sequence[Run]

    @property
    def columns(self) -> list[str]:
        """The headings of the table."""
        return [*COLUMNS, "answer"] if any(row.answers for row in self.rows) else list(COLUMNS)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one dictionary per strategy, for example for ``pandas.DataFrame``."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        """Return the table as plain text."""
        return align_columns([self.columns, *(row.format() for row in self.rows)])

    def _repr_html_(self) -> str:
        """Return the table as HTML for Jupyter."""
        return format_table(self.columns, [row.format() for row in self.rows])


def compare(
    model: Any,
    inputs: Mapping[str, Any],
    reducers: Sequence[TokenReducer],
    *,
    processor: Any = None,
    max_new_tokens: int = 16,
) -> Comparison:
    """Generate once with each strategy and return a table with one row per strategy.

    Before the first strategy, one call without reduction warms the model up. A budget of 1.0 gives a row with all
    tokens: ``compare(model, inputs, [HiRED(1.0), HiRED(0.2), FastV()])``.

    Args:
        model: an unmodified transformers model of a supported family.
        inputs: keyword arguments of `generate`, as the processor returns them, with at least one image.
        reducers: the strategies, of any stage, compositions included.
        processor: decodes the answers and the question; without it the table has no answers.
        max_new_tokens: longest answer in tokens; decoding is greedy.

    Raises:
        ValueError: if there is no strategy, or no image was reduced.
    """
    if not reducers:
        raise ValueError("pass at least one strategy, such as [HiRED(1.0), HiRED(0.2)]")
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    length = inputs["input_ids"].shape[1]
    call_generate(model, inputs, **options)
    rows, runs = [], []
    for reducer in reducers:
        with reducer(model, tokenizer=processor) as run:
            began = time.perf_counter()
            output = call_generate(model, inputs, **options)
            texts = [] if processor is None else processor.batch_decode(output[:, length:], skip_special_tokens=True)
            seconds = time.perf_counter() - began
        account = run.account
        if not account.row_count:
            raise ValueError(f"{reducer.label} reduced no image; pass inputs with at least one image")
        rows.append(
            ComparisonRow(
                strategy=reducer.label,
                budget=format_budget(reducer.budget_label),
                kept=account.kept,
                valid=account.valid,
                average_tokens=account.average_tokens,
                kv_ratio=account.kv_bytes / account.kv_bytes_full,
                flops_ratio=account.flops / account.flops_full,
                seconds=seconds,
                answers=tuple(text.strip() for text in texts),
            )
        )
        runs.append(run)
    return Comparison(rows, runs)
