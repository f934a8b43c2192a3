"""The order of a report, and what stands around its tables."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence

from tokenprune.experiments.analysis.report.blocks import Block, Heading, Picture, Table, Text
from tokenprune.experiments.analysis.report.effects import factor_blocks
from tokenprune.experiments.analysis.report.failures import Comparison, failure_blocks
from tokenprune.experiments.analysis.report.formatting import SAME, budget_text, interval_text
from tokenprune.experiments.analysis.report.rows import budgets, full_rows, metric_text, setting_text, settings
from tokenprune.experiments.analysis.report.tables import (
    accuracy_table,
    breakdown_blocks,
    full_blocks,
    is_random,
    random_blocks,
    token_blocks,
)
from tokenprune.experiments.analysis.stats import Cell, Results, factors, short

FEW_GROUPS = 20
"""With fewer groups a bootstrap makes intervals too narrow."""


def contents(results: Results, pairs: Sequence[Comparison] = ()) -> list[Block]:
    """Return the report, ready to be written in any form.

    Args:
        results: what was read.
        pairs: the settings whose failures stand side by side.
    """
    cells = results.cells
    blocks: list[Block] = [Heading(f"Report of {results.name}", 1), Text([about(cells)])]
    notes = [*results.notes, *completeness(cells)]
    if notes:
        blocks += [Text(["**Before you read on:**"]), Text(notes, bullets=True)]
    blocks += [
        Text(
            [
                "Numbers are percent or points, with 95 % intervals in brackets from a bootstrap that resamples "
                "groups (the samples of one picture). Differences are paired, sample by sample. **No difference "
                "seen** means that the interval holds zero: these samples do not tell the two apart, which does not "
                "make them equal. Samples with an error are left out of all means and counted at the end."
            ]
        ),
        Heading("Figures"),
        Picture(
            "figures/accuracy_vs_tokens.png",
            "Score against visual tokens kept, mean over samples, 95 % intervals. Points at one count are moved "
            "apart sideways. The grey line joins the points that no other beats in both (Pareto front of the means; "
            "whether two of them differ is for the tables to say).",
        ),
        Picture(
            "figures/accuracy_vs_time.png",
            "Score against time for one sample: encoding, choosing and generating, median over samples. Times "
            "belong to the machine and what else ran on it.",
        ),
    ]
    parts = settings(cells)
    for part in parts.values():
        if len(parts) > 1:
            blocks.append(Heading(setting_text(part[0])))
        blocks += setting_blocks(part, 3 if len(parts) > 1 else 2)
    blocks += [
        *factor_blocks(factors(cells)),
        *failure_blocks(pairs, len(parts) > 1),
        *error_blocks(cells),
        *environment_blocks(cells),
    ]
    return blocks


def about(cells: Sequence[Cell]) -> str:
    """Return what was run, in a sentence or two.

    Args:
        cells: the experiments.
    """
    parts = settings(cells)
    samples = {(cell.setting[1], record["sample"]) for cell in cells for record in cell.records}
    groups = {(cell.setting[1], record["group"]) for cell in cells for record in cell.records}
    what = f" on {setting_text(cells[0])}" if len(parts) == 1 and any(map(json.loads, cells[0].setting)) else ""
    metrics = sorted({metric_text(cell) for cell in cells})
    return (
        f"{len(cells)} experiments{what}: {len(samples)} samples in {len(groups)} groups. "
        f"Score: {', '.join(metrics)}, in percent."
    )


def completeness(cells: Sequence[Cell]) -> list[str]:
    """Return what limits the comparisons: cells of different length, missing baselines, few groups.

    Args:
        cells: the experiments.
    """
    notes = []
    for part in settings(cells).values():
        where = f" ({setting_text(part[0])})" if len(settings(cells)) > 1 else ""
        most = max(len(cell.records) for cell in part)
        short_ones = [cell for cell in part if len(cell.records) < most]
        if short_ones:
            named = "; ".join(f"{cell.name}: {len(cell.records)}" for cell in short_ones[:8])
            more = f"; and {len(short_ones) - 8} more" if len(short_ones) > 8 else ""
            notes.append(
                f"Not every experiment holds all {most} samples{where}: {named}{more}. Differences use the samples "
                "in common, means do not, so means of these experiments do not compare with others."
            )
        reduced = [cell for cell in part if cell.role != "full"]
        if reduced and not any(cell.role == "full" for cell in part):
            notes.append(f"No experiment with full tokens is here{where}: differences to full tokens are left out.")
        lacking = [budget for budget in budgets(part) if not any(is_random(c, budget) for c in part)]
        if reduced and len(lacking) == len(budgets(part)):
            notes.append(f"No experiment with random tokens is here{where}: differences to random tokens are left out.")
        elif lacking:
            at = ", ".join(map(budget_text, lacking))
            notes.append(f"No random tokens at {at}{where}: differences to random tokens are left out there.")
        groups = {record["group"] for cell in part for record in cell.answered.values()}
        if len(groups) < FEW_GROUPS:
            notes.append(
                f"{len(groups)} group{'s' if len(groups) != 1 else ''} only{where}: with fewer than {FEW_GROUPS} the "
                "intervals are too narrow."
            )
    return notes


def setting_blocks(cells: Sequence[Cell], level: int) -> list[Block]:
    """Return the tables of one model and task.

    Args:
        cells: its experiments.
        level: level of the headings.
    """
    metric = metric_text(cells[0])
    title = metric[:1].upper() + metric[1:]
    blocks: list[Block] = [Heading(title, level)]
    full = [(name[0].upper() + name[1:], cell.score) for name, cell in full_rows(cells)]
    blocks += [Text([f"{name}: {interval_text(score)}"]) for name, score in full]
    reduced = [cell for cell in cells if cell.role != "full"]
    if reduced:
        text = f"Bold: best of its column. {SAME}: no difference to it seen on the same samples. Every seed is a row."
        blocks += [accuracy_table(cells), Text([text])]
    blocks += full_blocks(cells, level)
    blocks += random_blocks(cells, level)
    for name, heading in (("type", "By type of question"), ("split", "By split")):
        blocks += breakdown_blocks(cells, name, f"{title}: {heading[0].lower()}{heading[1:]}", level)
    return [*blocks, Heading("Tokens and time", level), *token_blocks(cells)]


def error_blocks(cells: Sequence[Cell]) -> list[Block]:
    """Return the errors, the most frequent message of each experiment with how often it came.

    Args:
        cells: the experiments.
    """
    failed = [cell for cell in cells if cell.n_errors]
    if not failed:
        return [Heading("Errors"), Text(["No sample ended in an error."])]
    lines = []
    for cell in failed:
        texts = Counter(" ".join(str(r["error"]).split()) for r in cell.records if r.get("error") is not None)
        message, count = texts.most_common(1)[0]
        shown = textwrap.shorten(message.replace("`", "'"), 160, placeholder=" ...") or "no message"
        lines.append([cell.name, f"{cell.n_errors} of {len(cell.records)}", f"{count}", f"`{shown}`"])
    return [Heading("Errors"), Table(["experiment", "errors", "of this kind", "most frequent message"], lines)]


def environment_blocks(cells: Sequence[Cell]) -> list[Block]:
    """Return versions and devices, with all values where experiments differ.

    Args:
        cells: the experiments.
    """
    names = [name for name in dict.fromkeys(n for cell in cells for n in cell.environment) if name != "started"]
    lines = []
    for name in names:
        values = dict.fromkeys(short(cell.environment[name]) for cell in cells if name in cell.environment)
        lines.append([name, "; ".join(values) + (" (**not the same everywhere**)" if len(values) > 1 else "")])
    return [Heading("Environment"), Table(["", ""], lines)] if lines else []
