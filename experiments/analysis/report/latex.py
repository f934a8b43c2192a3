"""The main tables for LaTeX."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenprune.experiments.analysis.report.formatting import DASH, SAME, interval_text
from tokenprune.experiments.analysis.report.rows import context_text, contexts, full_rows, metric_text
from tokenprune.experiments.analysis.report.tables import accuracy_table
from tokenprune.experiments.analysis.stats import Setting


def latex(settings: Sequence[Setting]) -> str:
    """Return the main table for LaTeX with booktabs, one for each model and task.

    Args:
        settings: the experiments.
    """
    out = ["% Needs \\usepackage{booktabs,graphicx}; a table wider than the text is made smaller"]
    for part in contexts(settings).values():
        table = accuracy_table(part, bold="")
        lines = [[name.strip(), *(_entry(e) for e in entries)] for name, *entries in table.rows]
        full = [(_text(name), interval_text(setting.score)) for name, setting in full_rows(part)]
        columns = len(table.head) - 1
        words = [f"{metric_text(part[0])} in percent, 95 % intervals from a bootstrap over groups"]
        if any(map(json.loads, part[0].context)):
            words.insert(0, context_text(part[0]))
        out += [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_text('; '.join(words))}. $\\approx$: no difference seen to the best of the column.}}",
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            f"\\begin{{tabular}}{{l{'r' * columns}}}",
            "\\toprule",
            " & ".join(map(_text, table.head)) + " \\\\",
            "\\midrule",
            *(f"{name} & \\multicolumn{{{max(1, columns)}}}{{c}}{{{_entry(e)}}} \\\\" for name, e in full),
            *(["\\midrule"] if full and lines else []),
            *(" & ".join([_text(name), *entries]) + " \\\\" for name, *entries in lines),
            "\\bottomrule",
            "\\end{tabular}}",
            "\\end{table}",
        ]
    return "\n".join(out) + "\n"


def _text(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", DASH: "--"}
    special |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
    return "".join(special.get(mark, mark) for mark in text)


def _entry(text: str) -> str:
    mean, _, rest = text.partition(" ")
    same = rest.endswith(SAME)
    rest = rest.removesuffix(SAME).strip()
    return _text(mean) + (f" {{\\scriptsize {_text(rest)}}}" if rest else "") + (" $\\approx$" if same else "")
