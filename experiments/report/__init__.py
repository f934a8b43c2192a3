"""Tables and figures of a run directory, from its records alone.

Run it: ``tokenprune report DIR``, or ``python -m tokenprune.experiments.report --directory DIR``

Writes report.md, report.tex (the main table), report.html (one file that needs no other), cells.csv, records.csv and
the figures. Nothing is measured again. What the numbers mean: ``docs/statistics.md``.

`contents` says what stands in a report as a list of blocks; `markdown` and `page` give it a form. `tables`, `effects`
and `figures` make its parts.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from tokenprune.experiments.report.contents import contents
from tokenprune.experiments.report.figures import figures
from tokenprune.experiments.report.files import cell_rows, record_rows, write_csv, write_parquet
from tokenprune.experiments.report.latex import latex
from tokenprune.experiments.report.looks import row_colours
from tokenprune.experiments.report.markdown import markdown
from tokenprune.experiments.report.page import page
from tokenprune.experiments.statistics import read

__all__ = ["main", "write_report"]


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
