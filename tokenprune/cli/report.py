"""The command `tokenprune report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from tokenprune.cli.errors import add_flag, parse_options
from tokenprune.experiments.analysis.report import write_report


def run(argv: Sequence[str]) -> None:
    """Run the command `report`, and print the path of each file that it writes."""
    parser = ArgumentParser(
        prog="tokenprune report",
        exit_on_error=False,
        allow_abbrev=False,
        description="Write tables and figures of a run directory as Markdown, LaTeX, HTML and CSV, from its records.",
    )
    parser.add_argument("directory", type=str, help="run directory of `ablate` or `evaluate`")
    parser.add_argument("--out", type=str, help="folder of the report; by default DIRECTORY")
    parser.add_argument(
        "--compare",
        type=str,
        nargs=2,
        metavar=("A", "B"),
        help="names or hashes of two settings whose failures are shown side by side; by default the best two at the "
        "smallest budget",
    )
    add_flag(parser, "--parquet", "also write Parquet files; requires pyarrow")
    config = parse_options(parser, argv)

    out = None if config.out is None else Path(config.out)
    for file in write_report(Path(config.directory), out, config.compare, config.parquet):
        print(file)
