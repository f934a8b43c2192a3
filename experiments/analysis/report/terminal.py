"""Prints the main table of a run directory: a table of rich in a terminal, aligned plain text elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenprune.display import align_columns
from tokenprune.experiments.analysis.report.contents import MARKS, describe_run, list_few_groups
from tokenprune.experiments.analysis.report.formatting import DASH, format_interval
from tokenprune.experiments.analysis.report.rows import format_context, full_rows, group_by_context
from tokenprune.experiments.analysis.report.tables import accuracy_table
from tokenprune.experiments.analysis.results import Setting


def print_results(settings: Sequence[Setting], console: Console) -> None:
    """Print the scores of settings with their intervals, one table for each model and task.

    Args:
        settings: the settings.
        console: the console; lines wrap only in a terminal.
    """
    by_context = group_by_context(settings)
    print_text(console, describe_run(settings))
    for members in by_context.values():
        title = format_context(members[0]) if len(by_context) > 1 else ""
        print_table(console, title, list_rows(members))
        for note in list_few_groups(members):
            print_text(console, note)
    print_text(console, f"In brackets: 95 % intervals. {MARKS}")


def list_rows(settings: Sequence[Setting]) -> list[list[str]]:
    """Return the rows of the main table, with the headings first and the rows of full tokens last.

    Args:
        settings: the settings of one context.
    """
    table = accuracy_table(settings)
    full = [[name, format_interval(setting.score)] for name, setting in full_rows(settings)]
    rows = [list(table.head), *map(list, table.rows), *full]
    rows[0] += ["score"] * (len(rows[0]) == 1)
    return [[*row, *[""] * (len(rows[0]) - len(row))] for row in rows]


def print_table(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table; text between double asterisks is bold in a terminal, which gets parts of a wide table.

    Args:
        console: the console.
        title: text above the table; empty for none.
        rows: the texts of each row, headings first.
    """
    if not console.is_terminal:
        has_rivals = len(rows) > 2
        plain = [[text if has_rivals else text.replace("**", "") for text in row] for row in rows]
        print_text(console, "\n".join([*([title] if title else []), align_columns(plain)]))
        return
    for part in split_columns(rows, console.width):
        table = Table(title=title or None, title_justify="left")
        for name in part[0]:
            table.add_column(name, overflow="fold")
        for row in part[1:]:
            table.add_row(*map(_format_bold, row))
        console.print(table)


def split_columns(rows: Sequence[Sequence[str]], width: int) -> list[list[list[str]]]:
    """Return parts of a table that fit into a width; each begins with the first column, and has no empty rows.

    Args:
        rows: the texts of each row, headings first.
        width: number of characters.
    """
    widths = [max(len(text) for text in column) + 3 for column in zip(*rows, strict=True)]
    groups: list[list[int]] = [[]]
    for number in range(1, len(widths)):
        if groups[-1] and 1 + widths[0] + sum(widths[n] for n in groups[-1]) + widths[number] > width:
            groups.append([])
        groups[-1].append(number)
    parts = [[[row[0], *(row[number] for number in group)] for row in rows] for group in groups]
    return [[row for row in part if {*row[1:]} - {DASH, ""}] for part in parts]


def print_text(console: Console, text: str) -> None:
    """Print text without markup; lines wrap only in a terminal."""
    console.print(Text(text), soft_wrap=not console.is_terminal)


def _format_bold(text: str) -> Text:
    parts = text.split("**")
    return Text.assemble(*((part, "bold" if number % 2 else "") for number, part in enumerate(parts)))
