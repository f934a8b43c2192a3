"""The command `tokenprune cost`."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.cli.errors import parse_options
from tokenprune.experiments.bench.cost import report


def run(argv: Sequence[str]) -> None:
    """Run the command `cost`."""
    report.run(parse_options(report.build_cost_parser(), argv))
