"""The command `tokenprune check`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tokenprune.budget import NoTokenWarning, OneTokenWarning
from tokenprune.cli.errors import UserError
from tokenprune.cli.listing import print_report
from tokenprune.cli.options import ReducerConfig, build_parser, parse_options, select_fields
from tokenprune.cli.status import hide_transformers_warnings, show_status
from tokenprune.testing.conformance import check_reducer


@dataclass(frozen=True)
class CheckConfig(ReducerConfig):
    """Options of `tokenprune check`.

    Args:
        families: model families whose example models run; by default all of them.
        json: print JSON.
    """

    families: list[str] | None = None
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command `check`, and return the exit code: 1 if the strategy fails a check, otherwise 0."""
    description = "Check a strategy against the contract of the library: exact budgets, batch invariance, ..."
    parser = build_parser("tokenprune check", description, CheckConfig)
    parser.usage = (
        "tokenprune check NAME | file.py:Class [--reducer.PARAMETER VALUE ...] [--families NAME ...] [--json]"
    )
    arguments = ["--reducer", *argv] if argv and not argv[0].startswith("-") else list(argv)
    config = select_fields(CheckConfig, parse_options(parser, arguments, {}))
    if config.reducer is None:
        raise UserError("name the strategy to check: tokenprune check HiRED, or tokenprune check file.py:Class")
    status = show_status(f"checking {config.reducer.label}")
    with warnings.catch_warnings(), hide_transformers_warnings(), status as show_step:
        for category in (OneTokenWarning, NoTokenWarning):  # the checks themselves use budgets of one and no token
            warnings.simplefilter("ignore", category)
        report = check_reducer(config.reducer, config.families, show_step)
    if config.json:
        print(json.dumps({"passed": report.passed, **asdict(report)}))
    else:
        print_report(report)
    return 0 if report.passed else 1
