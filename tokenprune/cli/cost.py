"""The command `tokenprune cost`."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.experiments.bench.cost import report


def run(argv: Sequence[str]) -> None:
    """Run the command `cost`."""
    description = (
        "Count what a model costs without running or downloading it, and predict time and memory for a "
        "table of devices from their datasheets (roofline)."
    )
    parser = build_parser("tokenprune cost", description, report.CostConfig)
    report.run(select_fields(report.CostConfig, parse_options(parser, argv)))
