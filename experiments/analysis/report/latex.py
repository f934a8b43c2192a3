"""Renders the main tables of a report for LaTeX."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenprune.experiments.analysis.report.formatting import DASH, SAME, format_interval
from tokenprune.experiments.analysis.report.rows import format_context, format_metric, full_rows, group_by_context
from tokenprune.experiments.analysis.report.tables import accuracy_table
from tokenprune.experiments.analysis.stats import Setting


def render_latex(settings: Sequence[Setting]) -> str:
    """Return the main table of each model and task for LaTeX with booktabs.

    Args:
        settings: the settings.
    """
    out = ["% Needs \\usepackage{booktabs,graphicx}; a table wider than the text is scaled down"]
    for members in group_by_context(settings).values():
        table = accuracy_table(members, bold="")
        lines = [[name.strip(), *(_format_entry(entry) for entry in entries)] for name, *entries in table.rows]
        full = [(_escape(name), format_interval(setting.score)) for name, setting in full_rows(members)]
        columns = len(table.head) - 1
        caption = [f"{format_metric(members[0])} in percent, 95 % intervals from a bootstrap over groups"]
        if any(map(json.loads, members[0].context)):
            caption.insert(0, format_context(members[0]))
        out += [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_escape('; '.join(caption))}. $\\approx$: no difference seen to the best of the column.}}",
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            f"\\begin{{tabular}}{{l{'r' * columns}}}",
            "\\toprule",
            " & ".join(map(_escape, table.head)) + " \\\\",
            "\\midrule",
            *(
                f"{name} & \\multicolumn{{{max(1, columns)}}}{{c}}{{{_format_entry(entry)}}} \\\\"
                for name, entry in full
            ),
            *(["\\midrule"] if full and lines else []),
            *(" & ".join([_escape(name), *entries]) + " \\\\" for name, *entries in lines),
            "\\bottomrule",
            "\\end{tabular}}",
            "\\end{table}",
        ]
    return "\n".join(out) + "\n"


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", DASH: "--"}
    special |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
    return "".join(special.get(mark, mark) for mark in text)


def _format_entry(text: str) -> str:
    mean, _, suffix = text.partition(" ")
    is_same = suffix.endswith(SAME)
    suffix = suffix.removesuffix(SAME).strip()
    interval = f" {{\\scriptsize {_escape(suffix)}}}" if suffix else ""
    return _escape(mean) + interval + (" $\\approx$" if is_same else "")
