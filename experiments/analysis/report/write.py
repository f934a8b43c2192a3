"""Writes all files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from tokenprune.experiments.analysis.report.contents import contents
from tokenprune.experiments.analysis.report.failures import side_by_side
from tokenprune.experiments.analysis.report.figures import figures
from tokenprune.experiments.analysis.report.files import (
    need_pyarrow,
    record_rows,
    setting_rows,
    write_csv,
    write_parquet,
)
from tokenprune.experiments.analysis.report.html import page
from tokenprune.experiments.analysis.report.latex import latex
from tokenprune.experiments.analysis.report.markdown import markdown
from tokenprune.experiments.analysis.report.style import row_colors
from tokenprune.experiments.analysis.stats import read


def write_report(
    directory: Path, out: Path | None = None, compare: Sequence[str] | None = None, parquet: bool = False
) -> list[Path]:
    """Write the tables and figures of a run directory and return their paths.

    Args:
        directory: the run directory.
        out: folder to write to; the run directory itself if left out.
        compare: names or hashes of the two settings whose failures are shown; left out, the best two at the smallest
            budget.
        parquet: whether to write settings.parquet and records.parquet too; needs pyarrow.

    Raises:
        ValueError: if it is no run directory or holds nothing to report, or a setting to compare is not known.
        ImportError: if pyarrow is needed and not there.
    """
    if parquet:
        need_pyarrow()
    results = read(directory)
    pairs = side_by_side(results, compare)
    out = directory if out is None else out
    (out / "figures").mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures(results.settings).items():
        written.append(out / "figures" / f"{name}.png")
        FigureCanvasAgg(figure).print_png(str(written[-1]))
    for old in (out / "figures").glob("failure-*.png"):
        old.unlink()
    for failure in (failure for pair in pairs for failure in pair.shown):
        for name, image in failure.images().items():
            written.append(out / name)
            image.save(written[-1])
    blocks = contents(results, pairs)
    pages = {
        "report.md": markdown(blocks),
        "report.tex": latex(results.settings),
        "report.html": page(blocks, out, row_colors(results.settings)),
    }
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
    files = [out / name for name in pages]
    for name, lines in (("settings", setting_rows(results.settings)), ("records", record_rows(results.settings))):
        files.append(out / f"{name}.csv")
        write_csv(files[-1], lines)
        if parquet:
            files.append(out / f"{name}.parquet")
            write_parquet(files[-1], lines)
    return [*files, *written]


def main(directory: str, out: str | None = None, compare: list[str] | None = None, parquet: bool = False) -> None:
    """Write the tables and figures of a run directory and print their paths.

    Args:
        directory: the run directory, as `tokenprune ablate` or `tokenprune evaluate` wrote it.
        out: folder to write to; the run directory itself if left out.
        compare: names or hashes of the two settings whose failures are shown; the best two if left out.
        parquet: whether to write settings.parquet and records.parquet too; needs pyarrow.
    """
    for path in write_report(Path(directory), None if out is None else Path(out), compare, parquet):
        print(path)
