"""The command `tokenprune report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.cli.progress import print_settings
from tokenprune.experiments.analysis.report import write_report
from tokenprune.experiments.analysis.results import read_results


@dataclass(frozen=True)
class ReportConfig:
    """Options of `tokenprune report`.

    Args:
        directory: run directory of `ablate` or `evaluate`.
        out: folder of the report; by default DIRECTORY.
        compare: names or hashes of two settings whose failures are shown side by side; by default the best two at the
            smallest budget.
        parquet: also write Parquet files; requires pyarrow.
    """

    directory: str
    out: str | None = None
    compare: tuple[str, str] | None = field(default=None, metadata={"metavar": ("A", "B")})
    parquet: bool = False


def run(argv: Sequence[str]) -> None:
    """Run the command `report`: print the main table, and the path of each file that it writes."""
    description = "Write tables and figures of a run directory as Markdown, LaTeX, HTML and CSV, from its records."
    parser = build_parser("tokenprune report", description, ReportConfig)
    config = select_fields(ReportConfig, parse_options(parser, argv))
    out = None if config.out is None else Path(config.out)
    files = write_report(Path(config.directory), out, config.compare, config.parquet)
    print_settings(read_results(Path(config.directory)).settings)
    for file in files:
        print(file)
