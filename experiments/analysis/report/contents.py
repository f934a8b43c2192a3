"""The order of a report, and what stands around its tables."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence

from tokenprune.experiments.analysis.report.blocks import Block, Heading, Image, Table, Text
from tokenprune.experiments.analysis.report.effects import factor_blocks
from tokenprune.experiments.analysis.report.failures import Comparison, failure_blocks
from tokenprune.experiments.analysis.report.formatting import SAME, budget_text, interval_text
from tokenprune.experiments.analysis.report.rows import budgets, context_text, contexts, full_rows, metric_text
from tokenprune.experiments.analysis.report.tables import (
    accuracy_table,
    breakdown_blocks,
    full_blocks,
    is_random,
    random_blocks,
    token_blocks,
)
from tokenprune.experiments.analysis.stats import Results, Setting, factors, short

FEW_GROUPS = 20
"""With fewer groups a bootstrap makes intervals too narrow."""


def contents(results: Results, pairs: Sequence[Comparison] = ()) -> list[Block]:
    """Return the report, ready to be written in any form.

    Args:
        results: what was read.
        pairs: the settings whose failures stand side by side.
    """
    settings = results.settings
    blocks: list[Block] = [Heading(f"Report of {results.name}", 1), Text([about(settings)])]
    notes = [*results.notes, *completeness(settings)]
    if notes:
        blocks += [Text(["**Before you read on:**"]), Text(notes, bullets=True)]
    blocks += [
        Text(
            [
                "Numbers are percent or points, with 95 % intervals in brackets from a bootstrap that resamples "
                "groups (the samples of one image). Differences are paired, sample by sample. **No difference "
                "seen** means that the interval holds zero: these samples do not tell the two apart, which does not "
                "make them equal. Samples with an error are left out of all means and counted at the end."
            ]
        ),
        Heading("Figures"),
        Image(
            "figures/accuracy_vs_tokens.png",
            "Score against visual tokens kept, mean over samples, 95 % intervals. Points at one count are moved "
            "apart sideways. The grey line joins the points that no other beats in both (Pareto front of the means; "
            "whether two of them differ is for the tables to say).",
        ),
        Image(
            "figures/accuracy_vs_time.png",
            "Score against time for one sample: encoding, choosing and generating, median over samples. Times "
            "belong to the machine and what else ran on it.",
        ),
    ]
    parts = contexts(settings)
    for part in parts.values():
        if len(parts) > 1:
            blocks.append(Heading(context_text(part[0])))
        blocks += context_blocks(part, 3 if len(parts) > 1 else 2)
    blocks += [
        *factor_blocks(factors(settings)),
        *failure_blocks(pairs, len(parts) > 1),
        *error_blocks(settings),
        *environment_blocks(settings),
    ]
    return blocks


def about(settings: Sequence[Setting]) -> str:
    """Return what was run, in a sentence or two.

    Args:
        settings: the experiments.
    """
    parts = contexts(settings)
    samples = {(setting.context[1], record["sample"]) for setting in settings for record in setting.records}
    groups = {(setting.context[1], record["group"]) for setting in settings for record in setting.records}
    what = f" on {context_text(settings[0])}" if len(parts) == 1 and any(map(json.loads, settings[0].context)) else ""
    metrics = sorted({metric_text(setting) for setting in settings})
    return (
        f"{len(settings)} experiments{what}: {len(samples)} samples in {len(groups)} groups. "
        f"Score: {', '.join(metrics)}, in percent."
    )


def completeness(settings: Sequence[Setting]) -> list[str]:
    """Return what limits the comparisons: settings of different length, missing baselines, few groups.

    Args:
        settings: the experiments.
    """
    notes = []
    for part in contexts(settings).values():
        where = f" ({context_text(part[0])})" if len(contexts(settings)) > 1 else ""
        most = max(len(setting.records) for setting in part)
        short_ones = [setting for setting in part if len(setting.records) < most]
        if short_ones:
            named = "; ".join(f"{setting.name}: {len(setting.records)}" for setting in short_ones[:8])
            more = f"; and {len(short_ones) - 8} more" if len(short_ones) > 8 else ""
            notes.append(
                f"Not every experiment holds all {most} samples{where}: {named}{more}. Differences use the samples "
                "in common, means do not, so means of these experiments do not compare with others."
            )
        reduced = [setting for setting in part if setting.role != "full"]
        if reduced and not any(setting.role == "full" for setting in part):
            notes.append(f"No experiment with full tokens is here{where}: differences to full tokens are left out.")
        lacking = [budget for budget in budgets(part) if not any(is_random(c, budget) for c in part)]
        if reduced and len(lacking) == len(budgets(part)):
            notes.append(f"No experiment with random tokens is here{where}: differences to random tokens are left out.")
        elif lacking:
            at = ", ".join(map(budget_text, lacking))
            notes.append(f"No random tokens at {at}{where}: differences to random tokens are left out there.")
        groups = {record["group"] for setting in part for record in setting.answered.values()}
        if len(groups) < FEW_GROUPS:
            notes.append(
                f"{len(groups)} group{'s' if len(groups) != 1 else ''} only{where}: with fewer than {FEW_GROUPS} the "
                "intervals are too narrow."
            )
    return notes


def context_blocks(settings: Sequence[Setting], level: int) -> list[Block]:
    """Return the tables of one model and task.

    Args:
        settings: its experiments.
        level: level of the headings.
    """
    metric = metric_text(settings[0])
    title = metric[:1].upper() + metric[1:]
    blocks: list[Block] = [Heading(title, level)]
    full = [(name[0].upper() + name[1:], setting.score) for name, setting in full_rows(settings)]
    blocks += [Text([f"{name}: {interval_text(score)}"]) for name, score in full]
    reduced = [setting for setting in settings if setting.role != "full"]
    if reduced:
        text = f"Bold: best of its column. {SAME}: no difference to it seen on the same samples. Every seed is a row."
        blocks += [accuracy_table(settings), Text([text])]
    blocks += full_blocks(settings, level)
    blocks += random_blocks(settings, level)
    for name, heading in (("type", "By type of question"), ("split", "By split")):
        blocks += breakdown_blocks(settings, name, f"{title}: {heading[0].lower()}{heading[1:]}", level)
    return [*blocks, Heading("Tokens and time", level), *token_blocks(settings)]


def error_blocks(settings: Sequence[Setting]) -> list[Block]:
    """Return the errors, the most frequent message of each experiment with how often it came.

    Args:
        settings: the experiments.
    """
    failed = [setting for setting in settings if setting.n_errors]
    if not failed:
        return [Heading("Errors"), Text(["No sample ended in an error."])]
    lines = []
    for setting in failed:
        texts = Counter(" ".join(str(r["error"]).split()) for r in setting.records if r.get("error") is not None)
        message, count = texts.most_common(1)[0]
        shown = textwrap.shorten(message.replace("`", "'"), 160, placeholder=" ...") or "no message"
        lines.append([setting.name, f"{setting.n_errors} of {len(setting.records)}", f"{count}", f"`{shown}`"])
    return [Heading("Errors"), Table(["experiment", "errors", "of this kind", "most frequent message"], lines)]


def environment_blocks(settings: Sequence[Setting]) -> list[Block]:
    """Return versions and devices, with all values where experiments differ.

    Args:
        settings: the experiments.
    """
    names = [
        name for name in dict.fromkeys(n for setting in settings for n in setting.environment) if name != "started"
    ]
    lines = []
    for name in names:
        values = dict.fromkeys(short(setting.environment[name]) for setting in settings if name in setting.environment)
        lines.append([name, "; ".join(values) + (" (**not the same everywhere**)" if len(values) > 1 else "")])
    return [Heading("Environment"), Table(["", ""], lines)] if lines else []
