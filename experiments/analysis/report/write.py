"""Writes all files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from tokenprune.experiments.analysis.factors import compare_factors
from tokenprune.experiments.analysis.report.contents import build_report
from tokenprune.experiments.analysis.report.failures import compare_failures
from tokenprune.experiments.analysis.report.figures import draw_figures
from tokenprune.experiments.analysis.report.files import (
    import_pyarrow,
    record_rows,
    setting_rows,
    write_csv,
    write_parquet,
)
from tokenprune.experiments.analysis.report.html import render_html
from tokenprune.experiments.analysis.report.latex import render_latex
from tokenprune.experiments.analysis.report.markdown import render_markdown
from tokenprune.experiments.analysis.report.style import row_colors
from tokenprune.experiments.analysis.results import read_results


def write_report(
    directory: Path, out: Path | None = None, compare: Sequence[str] | None = None, parquet: bool = False
) -> list[Path]:
    """Write the tables and figures of a run directory and return their paths.

    Args:
        directory: the run directory.
        out: output folder; by default, the run directory.
        compare: names or hashes of the two settings whose failures are shown; by default, the best two at the smallest
            budget.
        parquet: whether to also write settings.parquet and records.parquet, which requires pyarrow.

    Raises:
        ValueError: if `directory` is no run directory or holds no record, or if `compare` names no setting.
        ImportError: if `parquet` is set and pyarrow is not installed.
    """
    if parquet:
        import_pyarrow()
    results = read_results(directory)
    pairs = compare_failures(results, compare)
    out = directory if out is None else out
    (out / "figures").mkdir(parents=True, exist_ok=True)
    image_paths = []
    factors = compare_factors(results.settings)
    for name, figure in draw_figures(results.settings, factors).items():
        image_paths.append(out / "figures" / f"{name}.png")
        FigureCanvasAgg(figure).print_png(str(image_paths[-1]))
    for outdated in (out / "figures").glob("failure-*.png"):
        outdated.unlink()
    for failure in (failure for pair in pairs for failure in pair.failures):
        for name, image in failure.images().items():
            image_paths.append(out / name)
            image.save(image_paths[-1])
    blocks = build_report(results, pairs, factors)
    pages = {
        "report.md": render_markdown(blocks),
        "report.tex": render_latex(results.settings),
        "report.html": render_html(blocks, out, row_colors(results.settings)),
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
    return [*files, *image_paths]


def main(directory: str, out: str | None = None, compare: list[str] | None = None, parquet: bool = False) -> None:
    """Write the tables and figures of a run directory and print their paths.

    Args:
        directory: the run directory, as written by `tokenprune ablate` or `tokenprune evaluate`.
        out: output folder; by default, the run directory.
        compare: names or hashes of the two settings whose failures are shown; by default, the best two.
        parquet: whether to also write settings.parquet and records.parquet, which requires pyarrow.
    """
    for path in write_report(Path(directory), None if out is None else Path(out), compare, parquet):
        print(path)
