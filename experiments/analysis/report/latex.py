"""Renders the main tables of a report for LaTeX."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tokenprune.experiments.analysis.report.formatting import DASH, SAME, format_interval
from tokenprune.experiments.analysis.report.rows import format_context, format_metric, full_rows, group_by_context
from tokenprune.experiments.analysis.report.tables import accuracy_table
from tokenprune.experiments.analysis.results import Setting


def render_latex(settings: Sequence[Setting]) -> str:
    """Return the main table of each model and task for LaTeX with booktabs.

    Args:
        settings: the settings.
    """
    environment = Environment(
        loader=PackageLoader("tokenprune.experiments.analysis.report"),
        autoescape=False,
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        block_start_string="((*",
        block_end_string="*))",
        variable_start_string="(((",
        variable_end_string=")))",
        comment_start_string="((=",
        comment_end_string="=))",
    )
    environment.filters |= {"escape": _escape, "entry": _format_entry}
    tables = [_main_table(members) for members in group_by_context(settings).values()]
    return environment.get_template("tables.tex.jinja").render(tables=tables)


def _main_table(members: Sequence[Setting]) -> dict[str, Any]:
    """Return the content of the main table of one model and task."""
    table = accuracy_table(members)
    caption = [f"{format_metric(members[0])} in percent, 95 % intervals from a bootstrap over groups"]
    if any(map(json.loads, members[0].context)):
        caption.insert(0, format_context(members[0]))
    return {
        "caption": "; ".join(caption),
        "columns": len(table.head) - 1,
        "head": table.head,
        "full": [(name, format_interval(setting.score)) for name, setting in full_rows(members)],
        "rows": table.rows,
    }


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", DASH: "--"}
    special |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
    return "".join(special.get(mark, mark) for mark in text)


def _format_entry(text: str) -> str:
    mean, _, suffix = text.partition(" ")
    is_same = suffix.endswith(SAME)
    suffix = suffix.removesuffix(SAME).strip()
    interval = f" {{\\scriptsize {_escape(suffix)}}}" if suffix else ""
    mean = re.sub(r"^\*\*(.*)\*\*$", r"\\textbf{\1}", _escape(mean))
    return mean + interval + (" $\\approx$" if is_same else "")
