"""Tables and figures of a run directory, from its records alone.

Run it: ``python -m tokenprune.experiments.report --directory DIR``

Writes report.md, report.tex (the main table), report.html (one file that needs no other), cells.csv, records.csv and
the figures. Nothing is measured again. What the numbers mean: ``docs/statistics.md``.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tokenprune.experiments.statistics import (
    Budget,
    Cell,
    Difference,
    Factor,
    Interval,
    Results,
    budget_order,
    by,
    compare,
    corrected,
    factors,
    full_of,
    pareto,
    randoms_of,
    read,
    short,
)

PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#332288",
    "#882255",
    "#999933",
    "#44AA99",
    "#AA4499",
    "#CC6677",
    "#117733",
)
"""Colours of Okabe and Ito, then of Tol's muted scheme, made for every kind of colour vision."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
FULL, RANDOM, INK = "#000000", "#7F7F7F", "#222222"
SAME = "≈"
"""Marks what cannot be told from the best of its column."""
FEW_GROUPS = 20
"""With fewer groups a bootstrap makes intervals too narrow."""
DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure and table.

    Args:
        colour: its colour.
        marker: its marker.
    """

    colour: str
    marker: str


@dataclass(frozen=True)
class Heading:
    """A heading.

    Args:
        text: the text.
        level: 1 for the title.
    """

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph, or a list; `**bold**` and code in backticks are understood.

    Args:
        lines: one paragraph each, or one entry each.
        bullets: whether they are entries of a list.
    """

    lines: Sequence[str]
    bullets: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        head: names of the columns.
        rows: entries, one for each column.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        path: the file, relative to the report.
        caption: what it shows.
    """

    path: str
    caption: str


Block: TypeAlias = Heading | Text | Table | Picture
Row: TypeAlias = tuple[str, dict[Budget, Cell]]
"""Name of a row and its experiments by budget."""


def write_report(directory: Path, out: Path | None = None) -> list[Path]:
    """Write the tables and figures of a run directory and return their paths.

    Args:
        directory: the run directory.
        out: folder to write to; the run directory itself if left out.

    Raises:
        ValueError: if it is no run directory or holds nothing to report.
    """
    results = read(directory)
    out = directory if out is None else out
    (out / "figures").mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures(results.cells).items():
        written.append(out / "figures" / f"{name}.png")
        FigureCanvasAgg(figure).print_png(str(written[-1]))
    blocks = contents(results)
    pages = {
        "report.md": markdown(blocks),
        "report.tex": latex(results.cells),
        "report.html": page(blocks, out, row_colours(results.cells)),
    }
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
    write_csv(out / "cells.csv", cell_rows(results.cells))
    write_csv(out / "records.csv", record_rows(results.cells))
    return [*(out / name for name in (*pages, "cells.csv", "records.csv")), *written]


# --- names and looks --------------------------------------------------------------------------------------------------


def styles(cells: Iterable[Cell]) -> dict[str, Style]:
    """Return one colour and marker per method, the same in every figure and table.

    Args:
        cells: the experiments.
    """
    methods = dict.fromkeys(cell.method for cell in cells)
    found = {"full tokens": Style(FULL, "*"), "Random": Style(RANDOM, "x")}
    for number, method in enumerate(name for name in methods if name not in found):
        # More methods than colours: the same hues, darker.
        darker = 0.55 ** (number // len(PALETTE))
        red, green, blue = (darker * part for part in to_rgb(PALETTE[number % len(PALETTE)]))
        found[method] = Style(to_hex((red, green, blue)).upper(), MARKERS[number % len(MARKERS)])
    return {method: found[method] for method in methods}


def settings(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Return the experiments by model and task, which are never compared with each other.

    Args:
        cells: the experiments.
    """
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.setting, []).append(cell)
    return found


def rows(cells: Sequence[Cell]) -> list[Row]:
    """Return the rows of a table: methods, and every seed of a method for itself; full tokens are no row.

    Args:
        cells: experiments of one setting.
    """
    reduced = [cell for cell in cells if cell.role != "full"]
    seeds: dict[str, set[int]] = {}
    for cell in reduced:
        seeds.setdefault(cell.method, set()).add(cell.seed)
    found: dict[str, dict[Budget, Cell]] = {}
    for cell in reduced:
        name = cell.method
        if len(seeds[name]) > 1 or cell.strategy == "Random":
            name += f", seed {cell.seed}"
        if cell.budget in found.get(name, {}):  # differs in something no factor names
            name += f" ({cell.hash[:6]})"
        found.setdefault(name, {})[cell.budget] = cell
    return list(found.items())


def full_rows(cells: Sequence[Cell]) -> list[tuple[str, Cell]]:
    """Return the experiments with all tokens by name; several are told apart by what differs in their configuration.

    Args:
        cells: experiments of one setting.
    """
    found = [cell for cell in cells if cell.role == "full"]
    keys = [
        key
        for key in ("dtype", "max_new_tokens", "temperature", "batch_size", "seed", "device")
        if len({c.config.get(key) for c in found}) > 1
    ]
    named = [", ".join(f"{key}={short(cell.config.get(key))}" for key in keys) for cell in found]
    return [(f"full tokens, {name}" if name else "full tokens", cell) for name, cell in zip(named, found, strict=True)]


def row_colours(cells: Sequence[Cell]) -> dict[str, str]:
    """Return the colour of every row of every table.

    Args:
        cells: the experiments.
    """
    looks = styles(cells)
    named = [
        (name, cell) for part in settings(cells).values() for name, entries in rows(part) for cell in entries.values()
    ]
    full = {name: FULL for part in settings(cells).values() for name, _ in full_rows(part)}
    return {**full, **{name: looks[cell.method].colour for name, cell in named}}


def budgets(cells: Iterable[Cell]) -> list[Budget]:
    """Return the budgets of all but full tokens, least first.

    Args:
        cells: the experiments.
    """
    found = {cell.budget for cell in cells if cell.role != "full"}
    return sorted(found, key=budget_order)


def budget_text(budget: Budget) -> str:
    """Return a budget as text.

    Args:
        budget: a ratio, a count as an `int`, words, or `None`.
    """
    if budget is None or isinstance(budget, str):
        return budget or "no budget"
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:.6g}%"


def number_text(value: float, sign: bool = False) -> str:
    """Return a share as percent with one decimal, never as minus zero.

    Args:
        value: the share.
        sign: whether to write a plus.
    """
    if math.isnan(value):
        return DASH
    return f"{round(100 * value, 1) + 0.0:{'+' if sign else ''}.1f}"


def interval_text(found: Interval, sign: bool = False) -> str:
    """Return a mean and its interval in percent.

    Args:
        found: the interval.
        sign: whether to write a plus.
    """
    if not found.n:
        return DASH
    if not found.known:
        return f"{number_text(found.mean, sign)} (one group, no interval)"
    return f"{number_text(found.mean, sign)} [{number_text(found.low, sign)}, {number_text(found.high, sign)}]"


def p_text(p: float | None) -> str:
    """Return a p-value as text.

    Args:
        p: the p-value.
    """
    if p is None or math.isnan(p):
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# --- comparisons ------------------------------------------------------------------------------------------------------


def against_full(cells: Sequence[Cell]) -> list[tuple[Cell, Difference]]:
    """Return every experiment minus full tokens, corrected over all of them.

    Args:
        cells: experiments of one setting.
    """
    pairs = [(cell, full_of(cell, cells)) for cell in cells if cell.role != "full"]
    found = [(cell, compare(cell, full)) for cell, full in pairs if full is not None]
    fixed = corrected([difference for _, difference in found])
    return [(cell, difference) for (cell, _), difference in zip(found, fixed, strict=True)]


def against_random(cells: Sequence[Cell]) -> list[tuple[Cell, int, Difference]]:
    """Return every experiment minus each seed of random tokens at its budget, corrected over all of them.

    Args:
        cells: experiments of one setting.
    """
    chosen = [cell for cell in cells if cell.role != "full" and cell.strategy != "Random"]
    found = [(cell, seed, compare(cell, other)) for cell in chosen for seed, other in randoms_of(cell, cells).items()]
    fixed = corrected([difference for *_, difference in found])
    return [(cell, seed, difference) for (cell, seed, _), difference in zip(found, fixed, strict=True)]


# --- the report -------------------------------------------------------------------------------------------------------


def contents(results: Results) -> list[Block]:
    """Return the report, ready to be written in any form.

    Args:
        results: what was read.
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
    blocks += [*factor_blocks(factors(cells)), *error_blocks(cells), *environment_blocks(cells)]
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


def setting_text(cell: Cell) -> str:
    """Return model and task of an experiment.

    Args:
        cell: an experiment of the setting.
    """
    model, task = (short(json.loads(value)) for value in cell.setting)
    return f"{model}, {task}"


def metric_text(cell: Cell) -> str:
    """Return the metric of an experiment in words.

    Args:
        cell: an experiment.
    """
    return cell.metric.replace("_", " ")


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
        lacking = [budget for budget in budgets(part) if not any(_is_random(c, budget) for c in part)]
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


def _is_random(cell: Cell, budget: Budget) -> bool:
    return cell.strategy == "Random" and cell.budget == budget


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


def accuracy_table(cells: Sequence[Cell], bold: str = "**") -> Table:
    """Return the main table: rows by budgets.

    Args:
        cells: experiments of one setting.
        bold: what stands around the best of a column.
    """
    columns, lines = budgets(cells), rows(cells)
    best = {
        budget: max(
            (entries[budget] for _, entries in lines if budget in entries and entries[budget].score.n),
            key=lambda cell: cell.score.mean,
            default=None,
        )
        for budget in columns
    }

    def entry(cell: Cell | None, top: Cell | None) -> str:
        if cell is None or top is None:
            return DASH
        text = interval_text(cell.score)
        if cell.score.mean == top.score.mean:
            mean, _, rest = text.partition(" ")
            return f"{bold}{mean}{bold} {rest}"
        same = cell.score.n and compare(top, cell).score.holds_zero
        return f"{text} {SAME}" if same else text

    table = [[name, *(entry(entries.get(b), best[b]) for b in columns)] for name, entries in lines]
    return Table(["method", *map(budget_text, columns)], table)


def full_blocks(cells: Sequence[Cell], level: int) -> list[Block]:
    """Return the differences to full tokens, or nothing without full tokens.

    Args:
        cells: experiments of one setting.
        level: level of the heading.
    """
    found = {cell.hash: difference for cell, difference in against_full(cells)}
    if not found:
        return []
    blocks: list[Block] = [Heading("Differences to full tokens", level)]
    for budget in budgets(cells):
        lines = []
        for name, entries in rows(cells):
            if budget in entries and entries[budget].hash in found:
                d = found[entries[budget].hash]
                numbers = [str(d.score.n), interval_text(d.score, sign=True), f"{d.only_first} / {d.only_second}"]
                lines.append([name, *numbers, p_text(d.p), p_text(d.holm), d.verdict])
        head = ["n", "minus full tokens", "only it / only full right", "McNemar p", "Holm p", "verdict"]
        blocks.append(Table([f"at {budget_text(budget)}", *head], lines))
    return [*blocks, Text([_family(len(found))])]


def random_blocks(cells: Sequence[Cell], level: int) -> list[Block]:
    """Return the differences to every seed of random tokens, or nothing without random tokens.

    Args:
        cells: experiments of one setting.
        level: level of the heading.
    """
    found = {(cell.hash, seed): difference for cell, seed, difference in against_random(cells)}
    if not found:
        return []
    blocks: list[Block] = [Heading("Differences to random tokens at the same budget", level)]
    for budget in budgets(cells):
        seeds = sorted({cell.seed for cell in cells if _is_random(cell, budget)})
        lines = [
            [name, *(_random_entry(found.get((entries[budget].hash, seed))) for seed in seeds)]
            for name, entries in rows(cells)
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
        f"comparison{'s' * (number > 1)} under this heading. McNemar's test takes the samples of one picture for "
        "independent, which they are not: trust the interval, unless fewer than about ten samples are right in one of "
        "the two only; then the interval is too narrow, and the test is the one to trust."
    )


def breakdown_blocks(cells: Sequence[Cell], name: str, heading: str, level: int) -> list[Block]:
    """Return scores by a field of the records, or nothing if no record has it.

    Args:
        cells: experiments of one setting.
        name: the field.
        heading: the heading.
        level: its level.
    """
    found = {cell.hash: by(cell, name) for cell in cells}
    values = sorted({value for parts in found.values() for value in parts})
    if not any(values):
        return []
    sizes = {value: max(parts[value].n for parts in found.values() if value in parts) for value in values}
    head = [f"{value or 'not given'} (n = {sizes[value]})" for value in values]
    missing = Interval(math.nan, math.nan, math.nan, 0, 0)

    def line(label: str, cell: Cell) -> list[str]:
        return [label, *(interval_text(found[cell.hash].get(value, missing)) for value in values)]

    full = [line(label, cell) for label, cell in full_rows(cells)]
    blocks: list[Block] = [Heading(heading, level)]
    if not budgets(cells):
        return [*blocks, Table(["method", *head], full)]
    for budget in budgets(cells):
        lines = [line(label, entries[budget]) for label, entries in rows(cells) if budget in entries]
        blocks.append(Table([f"at {budget_text(budget)}", *head], [*full, *lines]))
    return blocks


def token_blocks(cells: Sequence[Cell]) -> list[Block]:
    """Return tokens asked and kept, prompt lengths and times.

    Args:
        cells: experiments of one setting.
    """

    def line(name: str, budget: str, cell: Cell) -> list[str]:
        asked, kept = cell.mean("asked"), cell.mean("kept")
        prompt, whole = cell.mean("prompt_length"), cell.mean("prompt_length_full")
        times = [cell.median("encode_ms"), cell.median("select_ms"), cell.median("generate_ms")]
        share = kept / asked if asked else math.nan
        return [
            *(name, budget, _plain(asked), _plain(kept), number_text(share)),
            f"{_plain(prompt)} of {_plain(whole)}",
            *(_plain(time, 2) for time in times),
        ]

    lines = [line(name, "all", cell) for name, cell in full_rows(cells)]
    for budget in budgets(cells):
        named = [(name, entries[budget]) for name, entries in rows(cells) if budget in entries]
        lines += [line(name, budget_text(budget), cell) for name, cell in named]
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


def _plain(value: float, decimals: int = 1) -> str:
    return DASH if math.isnan(value) else f"{value:.{decimals}f}"


def factor_blocks(found: Sequence[Factor]) -> list[Block]:
    """Return which levels of each factor win, and whether the intervals say so.

    Args:
        found: the factors of the grid.
    """
    if not found:
        return []
    text = (
        "Every level is averaged over the same values of all other factors and over the same samples. A level is "
        "behind the best one if the interval of the paired difference leaves out zero. The best level is chosen by "
        "looking, so its lead is a little too large; and the mean over other factors can hide that a level wins "
        "with one of them and loses with another."
    )
    blocks: list[Block] = [Heading("Which levels win"), Text([text])]
    for one in found:
        blocks.append(Heading(f"`{one.name}`", 3))
        if not one.levels:
            why = "No setting of the other factors was run at every level on common samples: nothing to compare."
            blocks.append(Text([why]))
            continue
        lines = []
        for level in one.levels:
            behind = DASH if level.behind is None else interval_text(replace_sign(level.behind), sign=True)
            lines.append([level.name, interval_text(level.score), behind, _standing(level.behind)])
        per_level = one.cells // len(one.levels)
        count = f"{per_level} experiment{'s' if per_level != 1 else ''} a level"
        left = f", {one.left_out} without a partner at every level left out" if one.left_out else ""
        blocks += [
            Table(["level", "mean score", "minus the best", "standing"], lines),
            Text([f"{verdict(one)} ({count}{left}.)"]),
        ]
    return blocks


def replace_sign(found: Interval) -> Interval:
    """Return an interval of the opposite difference.

    Args:
        found: the interval.
    """
    return replace(found, mean=-found.mean, low=-found.high, high=-found.low)


def _standing(behind: Interval | None) -> str:
    if behind is None:
        return "best"
    return "not separated from the best" if behind.holds_zero else "behind the best"


def verdict(found: Factor) -> str:
    """Return in a sentence which level wins, or that none does.

    Args:
        found: a factor with levels.
    """
    best = found.levels[0].name
    rivals = [level.name for level in found.levels[1:] if level.behind is not None and level.behind.holds_zero]
    if not rivals:
        return f"**{best} wins**: every other level is behind it."
    if len(rivals) == len(found.levels) - 1:
        return f"**No winner**: the intervals separate {best} from no other level."
    return f"**No single winner**: the intervals do not separate {best} from {' and '.join(rivals)}."


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
        values = dict.fromkeys(short(cell.environment.get(name)) for cell in cells)
        lines.append([name, "; ".join(values) + (" (**not the same everywhere**)" if len(values) > 1 else "")])
    return [Heading("Environment"), Table(["", ""], lines)] if lines else []


# --- forms ------------------------------------------------------------------------------------------------------------


def markdown(blocks: Iterable[Block]) -> str:
    """Return a report as Markdown.

    Args:
        blocks: the report.
    """
    out = []
    for block in blocks:
        if isinstance(block, Heading):
            out.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            out.append("\n".join(f"- {line}" for line in block.lines) if block.bullets else "\n\n".join(block.lines))
        elif isinstance(block, Picture):
            out.append(f"![{block.caption.split('.')[0]}]({block.path})\n\n{block.caption}")
        else:
            lines = [block.head, ["---"] * len(block.head), *block.rows]
            # Even inside code a bar ends an entry.
            out.append(
                "\n".join(f"| {' | '.join(entry.replace('|', chr(92) + '|') for entry in line)} |" for line in lines)
            )
    return "\n\n".join(out) + "\n"


def latex(cells: Sequence[Cell]) -> str:
    """Return the main table for LaTeX with booktabs, one for each model and task.

    Args:
        cells: the experiments.
    """
    out = ["% Needs \\usepackage{booktabs}"]
    for part in settings(cells).values():
        table = accuracy_table(part, bold="")
        lines = [[name.strip(), *(_latex_entry(e) for e in entries)] for name, *entries in table.rows]
        full = [(_latex_text(name), interval_text(cell.score)) for name, cell in full_rows(part)]
        columns = len(table.head) - 1
        words = [f"{metric_text(part[0])} in percent, 95 % intervals from a bootstrap over groups"]
        if any(map(json.loads, part[0].setting)):
            words.insert(0, setting_text(part[0]))
        out += [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_latex_text('; '.join(words))}. $\\approx$: no difference seen to the best of the column.}}",
            f"\\begin{{tabular}}{{l{'r' * columns}}}",
            "\\toprule",
            " & ".join(map(_latex_text, table.head)) + " \\\\",
            "\\midrule",
            *(f"{name} & \\multicolumn{{{max(1, columns)}}}{{c}}{{{_latex_entry(e)}}} \\\\" for name, e in full),
            *(["\\midrule"] if full and lines else []),
            *(" & ".join([_latex_text(name), *entries]) + " \\\\" for name, *entries in lines),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
    return "\n".join(out) + "\n"


def _latex_text(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", DASH: "--"}
    special |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
    return "".join(special.get(mark, mark) for mark in text)


def _latex_entry(text: str) -> str:
    mean, _, rest = text.partition(" ")
    same = rest.endswith(SAME)
    rest = rest.removesuffix(SAME).strip()
    return (
        _latex_text(mean) + (f" {{\\scriptsize {_latex_text(rest)}}}" if rest else "") + (" $\\approx$" if same else "")
    )


CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #222; background: #fff;
  max-width: 1280px; margin: 2rem auto 4rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .6rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; } p, ul { max-width: 52rem; }
nav { font-size: .9rem; margin: 1rem 0; } nav a { margin-right: 1.1rem; white-space: nowrap; display: inline-block; }
a { color: #0072B2; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; background: #f3f3f3; padding: 0 .2em; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .55rem; border-bottom: 1px solid #e6e6e6; text-align: left; vertical-align: top; }
td { white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
td:first-child, td:last-child { white-space: normal; min-width: 9rem; max-width: 26rem; }
thead th { border-bottom: 2px solid #222; vertical-align: bottom; } tbody tr:hover { background: #f7f7f7; }
.ci { color: #666; font-size: .85em; white-space: nowrap; display: block; }
.note { background: #fff7e6; border-left: 4px solid #E69F00; padding: .1rem 1rem; margin: 1rem 0; }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .5em; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem;
  max-width: 52rem; }
@media print { nav { display: none; } .wide { overflow: visible; } }
"""


def page(blocks: Iterable[Block], folder: Path, colours: Mapping[str, str]) -> str:
    """Return a report as one HTML file that needs no other: style and figures are inside.

    Args:
        blocks: the report.
        folder: where the figures lie.
        colours: colour of rows by their name.
    """
    blocks = list(blocks)
    title = next(block.text for block in blocks if isinstance(block, Heading))
    places = {number: block for number, block in enumerate(blocks) if isinstance(block, Heading)}
    links = [f'<a href="#s{n}">{_inline(head.text)}</a>' for n, head in places.items() if head.level == 2]
    out = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body>",
    ]
    for number, block in enumerate(blocks):
        if isinstance(block, Heading):
            out.append(f'<h{block.level} id="s{number}">{_inline(block.text)}</h{block.level}>')
            if block.level == 1:
                out.append(f"<nav>{''.join(links)}</nav>")
        elif isinstance(block, Text) and block.bullets:
            entries = "".join(f"<li>{_inline(line)}</li>" for line in block.lines)
            out.append(f'<div class="note"><ul>{entries}</ul></div>')
        elif isinstance(block, Text):
            out += [f"<p>{_inline(line)}</p>" for line in block.lines]
        elif isinstance(block, Picture):
            data = base64.b64encode((folder / block.path).read_bytes()).decode()
            alt = html.escape(block.caption.split(".")[0])
            image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
            out.append(f"<figure>{image}<figcaption>{_inline(block.caption)}</figcaption></figure>")
        else:
            out.append(_html_table(block, colours))
    return "\n".join([*out, "</body></html>"]) + "\n"


def _html_table(table: Table, colours: Mapping[str, str]) -> str:
    head = "".join(f"<th>{_inline(name)}</th>" for name in table.head)
    body = []
    for line in table.rows:
        name = line[0]
        dot = f'<span class="dot" style="background:{colours[name]}"></span>' if name in colours else ""
        entries = [dot + _inline(name), *map(_html_entry, line[1:])]
        body.append(f"<tr>{''.join(f'<td>{entry}</td>' for entry in entries)}</tr>")
    top = f"<thead><tr>{head}</tr></thead>" if any(table.head) else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(body)}</tbody></table></div>'


def _html_entry(text: str) -> str:
    """Return an entry with its interval on a line of its own."""
    found = re.fullmatch(r"(\S+) (\[[^\]]*\])(.*)", text)
    if not found:
        return _inline(text)
    mean, inside, rest = found.groups()
    rest = rest.strip(" ,")
    if rest == SAME:
        return f'{_inline(mean)} {SAME}<span class="ci">{inside}</span>'
    return f'{_inline(mean)}<span class="ci">{inside}</span>' + (
        f'<span class="ci">{_inline(rest)}</span>' if rest else ""
    )


def _inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)


# --- files for other programs -----------------------------------------------------------------------------------------


def cell_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return one row an experiment, with its differences to full tokens and to every random seed that is there.

    Args:
        cells: the experiments.
    """
    full: dict[str, Difference] = {}
    random: dict[tuple[str, int], Difference] = {}
    for part in settings(cells).values():
        full |= {cell.hash: difference for cell, difference in against_full(part)}
        random |= {(cell.hash, seed): difference for cell, seed, difference in against_random(part)}
    found = []
    for cell in cells:
        row: dict[str, Any] = {
            "hash": cell.hash,
            "name": cell.name,
            "method": cell.method,
            "strategy": cell.strategy,
            "budget": cell.budget,
            "role": cell.role,
            "seed": cell.seed,
            "model": short(json.loads(cell.setting[0])),
            "task": short(json.loads(cell.setting[1])),
            "metric": cell.metric,
            "n": cell.score.n,
            "n_errors": cell.n_errors,
            "groups": cell.score.groups,
            "mean": cell.score.mean,
            "low": cell.score.low,
            "high": cell.score.high,
        }
        row |= {name: cell.mean(name) for name in ("asked", "kept", "prompt_length", "prompt_length_full")}
        row |= {f"{name}_median": cell.median(name) for name in ("encode_ms", "select_ms", "generate_ms")}
        if full:
            row |= _difference_row("minus_full", full.get(cell.hash))
        for seed in sorted({seed for _, seed in random}):
            row |= _difference_row(f"minus_random_{seed}", random.get((cell.hash, seed)))
        row |= {f"factor.{name}": short(value) for name, value in cell.factors.items()}
        found.append(row)
    return found


def _difference_row(name: str, difference: Difference | None) -> dict[str, Any]:
    parts = ("", "_low", "_high", "_n", "_mcnemar_p", "_holm_p", "_verdict")
    if difference is None:
        return {f"{name}{part}": None for part in parts}
    s, d = difference.score, difference
    values = (s.mean, s.low, s.high, s.n, d.p, d.holm, d.verdict)
    return {f"{name}{part}": value for part, value in zip(parts, values, strict=True)}


def record_rows(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Return one row a record, with what identifies its experiment; lists are written as JSON.

    Args:
        cells: the experiments.
    """
    found = []
    for cell in cells:
        head = {"hash": cell.hash, "method": cell.method, "budget": cell.budget, "role": cell.role, "seed": cell.seed}
        for record in cell.records:
            plain = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in record.items()}
            found.append(head | plain)
    return found


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV; what is not known stays empty.

    Args:
        path: the file.
        lines: the rows; they need not have the same names.
    """
    names = dict.fromkeys(name for line in lines for name in line)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names), restval="")
        writer.writeheader()
        writer.writerows({name: "" if _unknown(value) else value for name, value in line.items()} for line in lines)


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def write_parquet(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as Parquet.

    Args:
        path: the file.
        lines: the rows; they need not have the same names.

    Raises:
        ImportError: without pyarrow.
    """
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: `pip install pyarrow`; the CSV files hold the same rows") from error
    names = dict.fromkeys(name for line in lines for name in line)
    parquet.write_table(pyarrow.Table.from_pylist([{n: line.get(n) for n in names} for line in lines]), str(path))


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(cells: Sequence[Cell]) -> dict[str, Figure]:
    """Return the figures by name.

    Args:
        cells: the experiments.
    """
    time = ("encode_ms", "select_ms", "generate_ms")
    kept = {cell.hash: cell.mean("kept") for cell in cells}
    took = {cell.hash: cell.median(*time) for cell in cells}
    return {
        "accuracy_vs_tokens": scatter(cells, kept, "visual tokens kept, mean over samples", spread=True),
        "accuracy_vs_time": scatter(cells, took, "encode + select + generate, ms per sample, median", spread=False),
    }


def scatter(cells: Sequence[Cell], cost: Mapping[str, float], label: str, spread: bool) -> Figure:
    """Draw score against a cost with intervals and the Pareto front, a panel for each model and task.

    Args:
        cells: the experiments.
        cost: cost of each experiment by hash.
        label: what the cost is.
        spread: whether to move points of different methods apart sideways.
    """
    looks, parts = styles(cells), settings(cells)
    drawn = [c for c in cells if c.score.n and not math.isnan(cost[c.hash])]
    legend = _legend(drawn, looks)
    lines = sum(1 + str(handle.get_label()).count("\n") for handle in legend)
    tall = max(4.6 * len(parts), 0.5 + 0.175 * lines)
    figure = Figure(figsize=(10.0, min(tall, 40.0)), dpi=150, layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(parts), 1, squeeze=False)[:, 0])
    for axes, part in zip(panels, parts.values(), strict=True):
        shown = [cell for cell in part if cell in drawn]
        _panel(axes, shown, cost, looks, spread)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{metric_text(part[0])}, %")
        if len(parts) > 1:
            axes.set_title(textwrap.shorten(setting_text(part[0]), 80), fontsize=10)
    if legend:
        figure.legend(handles=legend, loc="outside right upper", fontsize=7.5, frameon=False)
    return figure


def _legend(cells: Sequence[Cell], looks: Mapping[str, Style]) -> list[Line2D]:
    seeds: dict[str, set[int]] = {}
    for cell in cells:
        seeds.setdefault(cell.method, set()).add(cell.seed)
    roles, handles = {cell.method: cell.role for cell in cells}, []
    for method, found in seeds.items():
        name = f"{method} (seeds {', '.join(map(str, sorted(found)))})" if len(found) > 1 else method
        name = "\n".join(textwrap.wrap(name, 42))
        line = {"full": "", "baseline": "--"}.get(roles[method], "-")
        look = looks[method]
        handles.append(Line2D([], [], color=look.colour, marker=look.marker, ls=line, lw=1, label=name, markersize=6))
    return [*handles, Line2D([], [], color="#BBBBBB", lw=4, label="Pareto front")] if handles else []


def _panel(
    axes: Axes, cells: Sequence[Cell], cost: Mapping[str, float], looks: Mapping[str, Style], spread: bool
) -> None:
    """Draw the experiments of one model and task."""
    known = [cost[cell.hash] for cell in cells]
    logarithmic = bool(known) and min(known) > 0 and max(known) > 4 * min(known)
    series = [(entries, cell.method) for _, entries in rows(cells) for cell in list(entries.values())[:1]]
    where = {cell.hash: cost[cell.hash] for cell in cells}
    if spread and logarithmic:
        # By a tenth at most: enough to see the markers, too little to be taken for another budget.
        for number, (entries, _) in enumerate(series):
            for cell in entries.values():
                where[cell.hash] *= 1.1 ** (2 * number / max(1, len(series) - 1) - 1)
    front = pareto([(cost[cell.hash], cell.score.mean) for cell in cells])
    steps = [(where[cells[place].hash], 100 * cells[place].score.mean) for place in front]
    if steps:
        axes.step(*zip(*steps, strict=True), where="post", color="#BBBBBB", lw=4, solid_capstyle="round", zorder=1)
    for entries, method in series:
        _points(axes, sorted(entries.values(), key=lambda cell: cost[cell.hash]), where, looks[method])
    for cell in cells:
        if cell.role == "full":
            axes.axhline(100 * cell.score.mean, color=FULL, lw=0.8, ls=":", zorder=1)
            _points(axes, [cell], where, looks[cell.method])
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#EEEEEE", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _points(axes: Axes, cells: Sequence[Cell], where: Mapping[str, float], style: Style) -> None:
    """Draw a series of points with intervals."""
    means = [100 * cell.score.mean for cell in cells]
    # The mean of skewed scores can lie outside a bootstrap's interval by a hair, and lengths must not be negative.
    below = [max(0.0, 100 * (c.score.mean - c.score.low)) if c.score.known else 0.0 for c in cells]
    above = [max(0.0, 100 * (c.score.high - c.score.mean)) if c.score.known else 0.0 for c in cells]
    size = 9 if style.marker == "*" else 5
    axes.errorbar(
        [where[cell.hash] for cell in cells],
        means,
        yerr=[below, above],
        color=style.colour,
        marker=style.marker,
        markersize=size,
        ls="--" if cells[0].role == "baseline" else "-",
        lw=0.9,
        elinewidth=1,
        capsize=2,
        zorder=3,
    )


def main(directory: str, out: str | None = None, parquet: bool = False) -> None:
    """Write the tables and figures of a run directory and print their paths.

    Args:
        directory: the run directory, as `tokenprune ablate` or `tokenprune evaluate` wrote it.
        out: folder to write to; the run directory itself if left out.
        parquet: whether to write cells.parquet and records.parquet too; needs pyarrow.
    """
    written = write_report(Path(directory), None if out is None else Path(out))
    if parquet:
        folder, cells = written[0].parent, read(Path(directory)).cells
        for name, lines in (("cells", cell_rows(cells)), ("records", record_rows(cells))):
            written.append(folder / f"{name}.parquet")
            write_parquet(written[-1], lines)
    for path in written:
        print(path)


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
