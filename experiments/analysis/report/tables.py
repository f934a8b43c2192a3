"""The tables of one model and task."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tokenprune.experiments.analysis.report.blocks import Block, Heading, Table, Text
from tokenprune.experiments.analysis.report.comparisons import against_full, against_random
from tokenprune.experiments.analysis.report.formatting import (
    DASH,
    SAME,
    budget_text,
    interval_text,
    number_text,
    p_text,
    plain,
)
from tokenprune.experiments.analysis.report.rows import budgets, full_rows, rows
from tokenprune.experiments.analysis.stats import Budget, Difference, Interval, Setting, by, compare


def accuracy_table(settings: Sequence[Setting], bold: str = "**") -> Table:
    """Return the main table: rows by budgets.

    Args:
        settings: experiments of one setting.
        bold: what stands around the best of a column.
    """
    columns, lines = budgets(settings), rows(settings)
    best = {
        budget: max(
            (entries[budget] for _, entries in lines if budget in entries and entries[budget].score.n),
            key=lambda setting: setting.score.mean,
            default=None,
        )
        for budget in columns
    }

    def entry(setting: Setting | None, top: Setting | None) -> str:
        if setting is None or top is None:
            return DASH
        text = interval_text(setting.score)
        if setting.score.mean == top.score.mean:
            mean, _, rest = text.partition(" ")
            return f"{bold}{mean}{bold} {rest}"
        same = setting.score.n and compare(top, setting).score.holds_zero
        return f"{text} {SAME}" if same else text

    table = [[name, *(entry(entries.get(b), best[b]) for b in columns)] for name, entries in lines]
    return Table(["method", *map(budget_text, columns)], table)


def full_blocks(settings: Sequence[Setting], level: int) -> list[Block]:
    """Return the differences to full tokens, or nothing without full tokens.

    Args:
        settings: experiments of one setting.
        level: level of the heading.
    """
    found = {setting.hash: difference for setting, difference in against_full(settings)}
    if not found:
        return []
    blocks: list[Block] = [Heading("Differences to full tokens", level)]
    for budget in budgets(settings):
        lines = []
        for name, entries in rows(settings):
            if budget in entries and entries[budget].hash in found:
                d = found[entries[budget].hash]
                numbers = [str(d.score.n), interval_text(d.score, sign=True), f"{d.only_first} / {d.only_second}"]
                lines.append([name, *numbers, p_text(d.p), p_text(d.holm), d.verdict])
        head = ["n", "minus full tokens", "only it / only full right", "McNemar p", "Holm p", "verdict"]
        blocks.append(Table([f"at {budget_text(budget)}", *head], lines))
    return [*blocks, Text([_family(len(found))])]


def random_blocks(settings: Sequence[Setting], level: int) -> list[Block]:
    """Return the differences to every seed of random tokens, or nothing without random tokens.

    Args:
        settings: experiments of one setting.
        level: level of the heading.
    """
    found = {(setting.hash, seed): difference for setting, seed, difference in against_random(settings)}
    if not found:
        return []
    blocks: list[Block] = [Heading("Differences to random tokens at the same budget", level)]
    for budget in budgets(settings):
        seeds = sorted({setting.seed for setting in settings if is_random(setting, budget)})
        lines = [
            [name, *(_random_entry(found.get((entries[budget].hash, seed))) for seed in seeds)]
            for name, entries in rows(settings)
            if budget in entries and any((entries[budget].hash, seed) in found for seed in seeds)
        ]
        if lines:
            head = [f"at {budget_text(budget)}", *(f"minus Random, seed {seed}" for seed in seeds)]
            blocks.append(Table(head, lines))
    return [*blocks, Text(["p: McNemar's, after Holm. " + _family(len(found))])]


def _random_entry(difference: Difference | None) -> str:
    if difference is None:
        return DASH
    p = p_text(difference.holm)
    text = f"{interval_text(difference.score, sign=True)} p {p if p.startswith('<') else f'= {p}'}"
    if difference.unpaired:
        text += f", n = {difference.score.n}"
    # Higher and lower show by the sign.
    words = re.sub(r"^(higher|lower)(, )?", "", difference.verdict)
    return f"{text}, {words}" if words else text


def _family(number: int) -> str:
    return (
        f"Higher and lower go by one interval alone; Holm's correction allows for {'all ' * (number > 1)}{number} "
        f"comparison{'s' * (number > 1)} under this heading. McNemar's test takes the samples of one image for "
        "independent, which they are not: trust the interval, unless fewer than about ten samples are right in one of "
        "the two only; then the interval is too narrow, and the test is the one to trust."
    )


def breakdown_blocks(settings: Sequence[Setting], name: str, heading: str, level: int) -> list[Block]:
    """Return scores by a field of the records, or nothing if no record has it.

    Args:
        settings: experiments of one setting.
        name: the field.
        heading: the heading.
        level: its level.
    """
    found = {setting.hash: by(setting, name) for setting in settings}
    values = sorted({value for parts in found.values() for value in parts})
    if not any(values):
        return []
    sizes = {value: max(parts[value].n for parts in found.values() if value in parts) for value in values}
    head = [f"{value or 'not given'} (n = {sizes[value]})" for value in values]
    missing = Interval(math.nan, math.nan, math.nan, 0, 0)

    def line(label: str, setting: Setting) -> list[str]:
        return [label, *(interval_text(found[setting.hash].get(value, missing)) for value in values)]

    full = [line(label, setting) for label, setting in full_rows(settings)]
    blocks: list[Block] = [Heading(heading, level)]
    if not budgets(settings):
        return [*blocks, Table(["method", *head], full)]
    for budget in budgets(settings):
        lines = [line(label, entries[budget]) for label, entries in rows(settings) if budget in entries]
        blocks.append(Table([f"at {budget_text(budget)}", *head], [*full, *lines]))
    return blocks


def token_blocks(settings: Sequence[Setting]) -> list[Block]:
    """Return tokens asked and kept, prompt lengths and times.

    Args:
        settings: experiments of one setting.
    """

    def line(name: str, budget: str, setting: Setting) -> list[str]:
        asked, kept = setting.mean("asked"), setting.mean("kept")
        prompt, whole = setting.mean("prompt_length"), setting.mean("prompt_length_full")
        times = [setting.median("encode_ms"), setting.median("select_ms"), setting.median("generate_ms")]
        share = kept / asked if asked else math.nan
        return [
            *(name, budget, plain(asked), plain(kept), number_text(share)),
            f"{plain(prompt)} of {plain(whole)}",
            *(plain(time, 2) for time in times),
        ]

    lines = [line(name, "all", setting) for name, setting in full_rows(settings)]
    for budget in budgets(settings):
        named = [(name, entries[budget]) for name, entries in rows(settings) if budget in entries]
        lines += [line(name, budget_text(budget), setting) for name, setting in named]
    head = [
        "method",
        "budget",
        "asked",
        "kept",
        "kept of asked, %",
        "prompt tokens",
        "encode ms",
        "select ms",
        "generate ms",
    ]
    return [Table(head, lines), Text(["Tokens are means over samples, times medians."])]


def is_random(setting: Setting, budget: Budget) -> bool:
    """Whether an experiment keeps random tokens at a budget.

    Args:
        setting: the experiment.
        budget: the budget.
    """
    return setting.strategy == "Random" and setting.budget == budget
