"""Builds a report: the order of its sections and the text around the tables."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Sequence

from tokenprune.display import format_count
from tokenprune.experiments.analysis.factors import Factor, compare_factors
from tokenprune.experiments.analysis.intervals import FEW_GROUPS
from tokenprune.experiments.analysis.report.blocks import Block, Heading, Image, Table, Text
from tokenprune.experiments.analysis.report.effects import factor_blocks
from tokenprune.experiments.analysis.report.failures import Comparison, failure_blocks
from tokenprune.experiments.analysis.report.figures import MAX_COLORED, has_flops
from tokenprune.experiments.analysis.report.formatting import SAME, format_budget, format_interval
from tokenprune.experiments.analysis.report.rows import (
    format_context,
    format_metric,
    full_rows,
    group_by_context,
    list_budgets,
)
from tokenprune.experiments.analysis.report.style import rank_methods
from tokenprune.experiments.analysis.report.tables import (
    accuracy_table,
    breakdown_blocks,
    compute_blocks,
    evidence_blocks,
    full_blocks,
    is_random,
    random_blocks,
    token_blocks,
)
from tokenprune.experiments.analysis.results import Results, Setting, shorten_value

MARKS = f"Bold: best of its column. {SAME}: no difference to it seen on common samples."
"""Explanation of the marks of the main table, the same in all formats."""


def build_report(
    results: Results, pairs: Sequence[Comparison] = (), factors: Sequence[Factor] | None = None
) -> list[Block]:
    """Return the report as a list of blocks.

    Args:
        results: the settings of a run directory.
        pairs: pairs of settings whose failures are shown next to each other.
        factors: the factors of the grid; None computes them.
    """
    settings = results.settings
    factors = compare_factors(settings) if factors is None else factors
    blocks: list[Block] = [Heading(f"Report of {results.name}", 1), Text([describe_run(settings)])]
    notes = [*results.notes, *completeness_notes(settings)]
    if notes:
        blocks += [Text(["**Limits of these results:**"]), Text(notes, bullets=True)]
    blocks += [
        Text(
            [
                "Numbers are percent or points, with 95 % intervals in brackets from a bootstrap that resamples "
                "groups (the samples of one image). Differences are paired, sample by sample. **No difference "
                "seen** means that the interval contains zero: these samples do not separate the two, which does not "
                "make them equal. Samples with an error are in no mean and are counted at the end."
            ]
        ),
        Heading("Figures"),
        Image(
            "figures/accuracy_vs_tokens.png",
            "Score against visual tokens, mean over LLM layers and samples, 95 % intervals. With more than "
            f"{MAX_COLORED} methods, the best by their mean lead at equal budgets are colored and the others gray. A "
            "band covers the seeds of random tokens. Points with the same count are moved apart horizontally. The pale "
            "line is the Pareto front of the means; the tables show whether two of its points differ.",
        ),
        *(
            [
                Image(
                    "figures/accuracy_vs_flops.png",
                    "Score against FLOPs of LLM prefill, in percent of the FLOPs with all tokens.",
                )
            ]
            if has_flops(settings)
            else []
        ),
        Image(
            "figures/accuracy_vs_time.png",
            f"Score against time for one sample, median: {describe_times(settings)} Times depend on the machine and "
            "its load.",
        ),
        *(
            [
                Image(
                    "figures/accuracy_by_method.png",
                    "Score against visual tokens, one panel for each method, best first; the other methods are gray.",
                )
            ]
            if len(rank_methods(settings)) > MAX_COLORED
            else []
        ),
    ]
    by_context = group_by_context(settings)
    for members in by_context.values():
        if len(by_context) > 1:
            blocks.append(Heading(format_context(members[0])))
        blocks += context_blocks(members, 3 if len(by_context) > 1 else 2)
    blocks += [
        *factor_blocks(factors),
        *failure_blocks(pairs, len(by_context) > 1),
        *error_blocks(settings),
        *environment_blocks(settings),
    ]
    return blocks


def describe_times(settings: Sequence[Setting]) -> str:
    """Return a sentence on the times that the figure of score against time shows.

    Args:
        settings: the settings.
    """
    if all(math.isnan(setting.median("prepare_alone_ms")) for setting in settings):
        return (
            "encoding, selection and generation. **All settings share one encoding**, and each is charged its full "
            "time, so the figure does not show what a strategy saves before the LLM."
        )
    return (
        "encoding, selection and generation of each setting by itself, without image processing. Encoding and "
        "selection are measured on the first images."
    )


def describe_run(settings: Sequence[Setting]) -> str:
    """Return a short text with the number of settings, samples and groups, and the metrics.

    Args:
        settings: the settings.
    """
    n_contexts = len(group_by_context(settings))
    samples = {(setting.context[1], record["sample"]) for setting in settings for record in setting.records}
    groups = {(setting.context[1], record["group"]) for setting in settings for record in setting.records}
    context = (
        f" on {format_context(settings[0])}" if n_contexts == 1 and any(map(json.loads, settings[0].context)) else ""
    )
    metrics = sorted({format_metric(setting) for setting in settings})
    return (
        f"{format_count(len(settings), 'setting')}{context}: {format_count(len(samples), 'sample')} in "
        f"{format_count(len(groups), 'group')}. "
        f"Score: {', '.join(metrics)}, in percent."
    )


def completeness_notes(settings: Sequence[Setting]) -> list[str]:
    """Return notes on the limits of the comparisons: missing samples, missing baselines and few groups.

    Args:
        settings: the settings.
    """
    notes = []
    by_context = group_by_context(settings)
    for members in by_context.values():
        context = f" ({format_context(members[0])})" if len(by_context) > 1 else ""
        most = max(len(setting.records) for setting in members)
        incomplete = [setting for setting in members if len(setting.records) < most]
        if incomplete:
            counts = "; ".join(f"{setting.name}: {len(setting.records)}" for setting in incomplete[:8])
            more = f"; and {len(incomplete) - 8} more" if len(incomplete) > 8 else ""
            notes.append(
                f"Not every setting holds all {most} samples{context}: {counts}{more}. Differences use only "
                "common samples, means use all samples, so means of these settings are not comparable."
            )
        reduced = [setting for setting in members if setting.role != "full"]
        if reduced and not any(setting.role == "full" for setting in members):
            notes.append(f"No setting uses full tokens{context}: differences to full tokens are omitted.")
        budgets = list_budgets(members)
        missing = [budget for budget in budgets if not any(is_random(setting, budget) for setting in members)]
        if reduced and len(missing) == len(budgets):
            notes.append(f"No setting uses random tokens{context}: differences to random tokens are omitted.")
        elif missing:
            listed = ", ".join(map(format_budget, missing))
            notes.append(f"No random tokens at {listed}{context}: differences to random tokens are omitted there.")
        notes += list_few_groups(members, context)
    return notes


def list_few_groups(settings: Sequence[Setting], context: str = "") -> list[str]:
    """Return a note if there are fewer than `FEW_GROUPS` groups; otherwise nothing.

    Args:
        settings: the settings of one context.
        context: text that names the context.
    """
    groups = {record["group"] for setting in settings for record in setting.valid_records.values()}
    if len(groups) >= FEW_GROUPS:
        return []
    count = format_count(len(groups), "group")
    return [f"{count} only{context}: with fewer than {FEW_GROUPS} the intervals are too narrow."]


def context_blocks(settings: Sequence[Setting], level: int) -> list[Block]:
    """Return the tables of one context (model and task).

    Args:
        settings: the settings of the context.
        level: level of the headings.
    """
    metric = format_metric(settings[0])
    title = metric[:1].upper() + metric[1:]
    blocks: list[Block] = [Heading(title, level)]
    full = [(name[0].upper() + name[1:], setting.score) for name, setting in full_rows(settings)]
    blocks += [Text([f"{name}: {format_interval(score)}"]) for name, score in full]
    reduced = [setting for setting in settings if setting.role != "full"]
    if reduced:
        blocks += [accuracy_table(settings), Text([f"{MARKS} Every seed is a row."])]
    blocks += full_blocks(settings, level)
    blocks += random_blocks(settings, level)
    for name, heading in (("type", "By type of question"), ("split", "By split")):
        blocks += breakdown_blocks(settings, name, f"{title}: {heading[0].lower()}{heading[1:]}", level)
    blocks += evidence_blocks(settings, level)
    blocks += compute_blocks(settings, level)
    return [*blocks, Heading("Tokens and time", level), *token_blocks(settings)]


def error_blocks(settings: Sequence[Setting]) -> list[Block]:
    """Return a table of the number of errors and the most frequent message of each setting.

    Args:
        settings: the settings.
    """
    failed = [setting for setting in settings if setting.n_errors]
    if not failed:
        return [Heading("Errors"), Text(["No sample ended in an error."])]
    lines = []
    for setting in failed:
        texts = Counter(" ".join(str(r["error"]).split()) for r in setting.records if r.get("error") is not None)
        message, count = texts.most_common(1)[0]
        excerpt = textwrap.shorten(message.replace("`", "'"), 160, placeholder=" ...") or "no message"
        lines.append([setting.name, f"{setting.n_errors} of {len(setting.records)}", f"{count}", f"`{excerpt}`"])
    return [Heading("Errors"), Table(["setting", "errors", "of this kind", "most frequent message"], lines)]


def environment_blocks(settings: Sequence[Setting]) -> list[Block]:
    """Return a table of versions and devices, with all values if settings differ.

    Args:
        settings: the settings.
    """
    names = [
        name for name in dict.fromkeys(n for setting in settings for n in setting.environment) if name != "started"
    ]
    lines = []
    for name in names:
        values = dict.fromkeys(
            shorten_value(setting.environment[name]) for setting in settings if name in setting.environment
        )
        lines.append([name, "; ".join(values) + (" (**differs between settings**)" if len(values) > 1 else "")])
    return [Heading("Environment"), Table(["", ""], lines)] if lines else []
