"""The tables of one model and task."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tokenprune.experiments.analysis.differences import Difference, compare
from tokenprune.experiments.analysis.intervals import Interval
from tokenprune.experiments.analysis.pareto import pareto_front
from tokenprune.experiments.analysis.report.blocks import Block, Heading, Table, Text
from tokenprune.experiments.analysis.report.comparisons import compare_with_full, compare_with_random
from tokenprune.experiments.analysis.report.formatting import (
    DASH,
    SAME,
    format_budget,
    format_interval,
    format_number,
    format_p_value,
    format_percent,
)
from tokenprune.experiments.analysis.report.rows import full_rows, list_budgets, method_rows
from tokenprune.experiments.analysis.results import Budget, Setting, is_random_strategy, scores_by_field


def accuracy_table(settings: Sequence[Setting]) -> Table:
    """Return the main table, with one row per method and one column per budget; the best of a column is bold.

    Args:
        settings: the settings of one context.
    """
    columns, lines = list_budgets(settings), method_rows(settings)
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
        text = format_interval(setting.score)
        if setting.score.mean == top.score.mean:
            mean, _, suffix = text.partition(" ")
            return f"**{mean}** {suffix}"
        is_same = setting.score.n and compare(top, setting).score.contains_zero
        return f"{text} {SAME}" if is_same else text

    table = [[name, *(entry(entries.get(b), best[b]) for b in columns)] for name, entries in lines]
    return Table(["method", *map(format_budget, columns)], table)


def full_blocks(settings: Sequence[Setting], level: int) -> list[Block]:
    """Return the tables of the differences to full tokens; empty without full tokens.

    Args:
        settings: the settings of one context.
        level: level of the heading.
    """
    differences = {setting.hash: difference for setting, difference in compare_with_full(settings)}
    if not differences:
        return []
    blocks: list[Block] = [Heading("Differences to full tokens", level)]
    for budget in list_budgets(settings):
        lines = []
        for name, entries in method_rows(settings):
            if budget in entries and entries[budget].hash in differences:
                d = differences[entries[budget].hash]
                numbers = [str(d.score.n), format_interval(d.score, sign=True), f"{d.only_first} / {d.only_second}"]
                lines.append([name, *numbers, format_p_value(d.p), format_p_value(d.holm), d.verdict])
        head = ["n", "minus full tokens", "only method correct / only full correct", "McNemar p", "Holm p", "verdict"]
        blocks.append(Table([f"at {format_budget(budget)}", *head], lines))
    return [*blocks, Text([_explain_tests(len(differences))])]


def random_blocks(settings: Sequence[Setting], level: int) -> list[Block]:
    """Return the tables of the differences to every seed of random tokens; empty without random tokens.

    Args:
        settings: the settings of one context.
        level: level of the heading.
    """
    differences = {(setting.hash, seed): difference for setting, seed, difference in compare_with_random(settings)}
    if not differences:
        return []
    blocks: list[Block] = [Heading("Differences to random tokens at the same budget", level)]
    for budget in list_budgets(settings):
        seeds = sorted({setting.seed for setting in settings if is_random(setting, budget)})
        lines = [
            [name, *(_random_entry(differences.get((entries[budget].hash, seed))) for seed in seeds)]
            for name, entries in method_rows(settings)
            if budget in entries and any((entries[budget].hash, seed) in differences for seed in seeds)
        ]
        if lines:
            head = [f"at {format_budget(budget)}", *(f"minus Random, seed {seed}" for seed in seeds)]
            blocks.append(Table(head, lines))
    return [*blocks, Text(["p: McNemar's, after Holm. " + _explain_tests(len(differences))])]


def _random_entry(difference: Difference | None) -> str:
    if difference is None:
        return DASH
    p = format_p_value(difference.holm)
    text = f"{format_interval(difference.score, sign=True)} p {p if p.startswith('<') else f'= {p}'}"
    if difference.unpaired:
        text += f", n = {difference.score.n}"
    # The sign already shows "higher" and "lower".
    verdict = re.sub(r"^(higher|lower)(, )?", "", difference.verdict)
    return f"{text}, {verdict}" if verdict else text


def _explain_tests(number: int) -> str:
    """Return the note on the tests of a table with a number of comparisons."""
    return (
        f"Higher and lower depend only on the interval; Holm's correction covers {'all ' * (number > 1)}{number} "
        f"comparison{'s' * (number > 1)} under this heading. McNemar's test treats the samples of one image as "
        "independent, which they are not. Use the interval. If only one of the two is right on fewer than about ten "
        "samples, the interval is too narrow; then use the test."
    )


def breakdown_blocks(settings: Sequence[Setting], name: str, heading: str, level: int) -> list[Block]:
    """Return tables of the scores for each value of a record field; empty if no record has the field.

    Args:
        settings: the settings of one context.
        name: the record field.
        heading: text of the heading.
        level: level of the heading.
    """
    scores = {setting.hash: scores_by_field(setting, name) for setting in settings}
    values = sorted({value for by_value in scores.values() for value in by_value})
    if not any(values):
        return []
    sizes = {value: max(by_value[value].n for by_value in scores.values() if value in by_value) for value in values}
    head = [f"{value or 'not given'} (n = {sizes[value]})" for value in values]
    missing = Interval(math.nan, math.nan, math.nan, 0, 0)

    def line(label: str, setting: Setting) -> list[str]:
        return [label, *(format_interval(scores[setting.hash].get(value, missing)) for value in values)]

    full = [line(label, setting) for label, setting in full_rows(settings)]
    blocks: list[Block] = [Heading(heading, level)]
    if not list_budgets(settings):
        return [*blocks, Table(["method", *head], full)]
    for budget in list_budgets(settings):
        lines = [line(label, entries[budget]) for label, entries in method_rows(settings) if budget in entries]
        blocks.append(Table([f"at {format_budget(budget)}", *head], [*full, *lines]))
    return blocks


def evidence_blocks(settings: Sequence[Setting], level: int) -> list[Block]:
    """Return the table of the evidence that kept tokens cover; empty if no sample has evidence.

    Args:
        settings: the settings of one context.
        level: level of the heading.
    """
    columns = list_budgets(settings)
    if not columns or not any(setting.evidence_coverage.n for setting in settings):
        return []
    lines = [
        [name, *(format_interval(entries[b].evidence_coverage) if b in entries else DASH for b in columns)]
        for name, entries in method_rows(settings)
    ]
    text = (
        "Share of the image regions with the answer that kept tokens cover, by area, averaged over the layers of the "
        "LLM. It is computed from positions only. Merged tokens are not counted."
    )
    head = ["method", *map(format_budget, columns)]
    return [Heading("Evidence coverage", level), Table(head, lines), Text([text])]


def token_blocks(settings: Sequence[Setting]) -> list[Block]:
    """Return the table of asked and kept tokens, prompt lengths and times.

    Columns of the vision tower exist if a strategy acts before or inside it.

    Args:
        settings: the settings of one context.
    """
    has_tower = any(not math.isnan(setting.tower_patches_share) for setting in settings)

    def line(name: str, budget: str, setting: Setting) -> list[str]:
        asked, kept = setting.mean("asked"), setting.mean("kept")
        prompt, full_prompt = setting.mean("prompt_length"), setting.mean("prompt_length_full")
        times = [setting.median(name) for name in ("prepare_alone_ms", "generate_ms", "encode_ms", "select_ms")]
        share = kept / asked if asked else math.nan
        return [
            *(name, budget, format_number(asked), format_number(kept), format_percent(share)),
            f"{format_number(prompt)} of {format_number(full_prompt)}",
            *(format_number(time, 2) for time in times),
            *([format_percent(setting.tower_patches_share), format_percent(setting.tower_flops_share)] * has_tower),
        ]

    lines = [line(name, "all", setting) for name, setting in full_rows(settings)]
    for budget in list_budgets(settings):
        named = [(name, entries[budget]) for name, entries in method_rows(settings) if budget in entries]
        lines += [line(name, format_budget(budget), setting) for name, setting in named]
    head = [
        "method",
        "budget",
        "asked",
        "kept",
        "kept of asked, %",
        "prompt tokens",
        "encode + select alone, ms",
        "generate, ms",
        "shared encode, ms",
        "select, ms",
        *(["tower patches, %", "tower FLOPs, %"] * has_tower),
    ]
    text = (
        "Tokens are means over samples, times medians. **Alone**: the time to encode an image and select its tokens if "
        "the setting runs by itself, measured on the first images. **Shared encode**: one encoding for all settings of "
        "the run, with the signals of all; it is no cost of a single setting. **Select** follows the shared encoding, "
        "and contains an encoding at another resolution."
    )
    if has_tower:
        text += (
            " **Tower patches**: patches in the layers of the vision tower, summed over layers, in percent of all. "
            "**Tower FLOPs**: in percent of the unmodified model, which runs all layers, on the first images. Settings "
            "with equal strategies before and inside the tower share an encoding of their own."
        )
    return [Table(head, lines), Text([text])]


def compute_blocks(settings: Sequence[Setting], level: int) -> list[Block]:
    """Return the table of scores in the order of the FLOPs of prefill; empty if records have no FLOPs.

    Strategies before the LLM and inside it spend a budget in different layers. Rows next to each other cost about the
    same.

    Args:
        settings: the settings of one context.
        level: level of the heading.
    """
    named = [(name, "all", setting) for name, setting in full_rows(settings)]
    named += [(name, format_budget(b), entries[b]) for name, entries in method_rows(settings) for b in entries]
    rows = sorted((row for row in named if not math.isnan(row[2].flops_share)), key=lambda row: row[2].flops_share)
    if not rows:
        return []
    front = set(pareto_front([(setting.flops_share, setting.score.mean) for _, _, setting in rows]))
    lines = [
        [
            *(name, budget, format_percent(setting.flops_share), format_number(setting.average_tokens)),
            *(format_number(setting.mean("kept")), format_interval(setting.score), "yes" if number in front else "no"),
        ]
        for number, (name, budget, setting) in enumerate(rows)
    ]
    head = ["method", "budget", "prefill FLOPs, %", "average tokens", "tokens entering", "score", "Pareto front"]
    text = (
        "FLOPs of prefill in the LLM, in percent of the prompt with all tokens. Average tokens: visual tokens averaged "
        "over the layers of the LLM. Both are means over samples. The Pareto front has the rows that no cheaper row "
        "equals or exceeds in its mean score."
    )
    return [Heading("Equal compute", level), Table(head, lines), Text([text])]


def is_random(setting: Setting, budget: Budget) -> bool:
    """Return whether a setting keeps random tokens at a budget.

    Args:
        setting: the setting.
        budget: the budget.
    """
    return is_random_strategy(setting.strategy) and setting.budget == budget
