"""The command `tokenprune check`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict

from jsonargparse import ArgumentParser

from tokenprune.budget import OneTokenWarning
from tokenprune.cli.errors import INPUT_ERRORS, UserError, add_flag, user_error
from tokenprune.cli.listing import print_report
from tokenprune.cli.parsing import prepare
from tokenprune.reducer import TokenReducer
from tokenprune.testing.conformance import check_reducer


def run(argv: Sequence[str]) -> int:
    """Run the command `check`, and return the exit code: 1 if the strategy fails a check, otherwise 0."""
    parser = ArgumentParser(
        prog="tokenprune check",
        usage="tokenprune check NAME | file.py:Class [--reducer.PARAMETER VALUE ...] [--families NAME ...] [--json]",
        exit_on_error=False,
        allow_abbrev=False,
        description="Check a strategy against the contract of the library: exact budgets, batch invariance, ...",
    )
    parser.add_argument("--plugin", type=list[str], default=[], help="Python files with further strategies")
    parser.add_argument("--reducer", type=TokenReducer, help="strategy, if it is not given as NAME")
    parser.add_argument(
        "--families", type=str, nargs="+", help="model families whose example models run; by default all of them"
    )
    add_flag(parser, "--json", "print JSON")
    arguments = ["--reducer", *argv] if argv and not argv[0].startswith("-") else list(argv)
    try:
        options = parser.instantiate(parser.parse_args(prepare(arguments)))
    except INPUT_ERRORS as error:
        raise user_error(error, parser) from error
    if options.reducer is None:
        raise UserError("name the strategy to check: tokenprune check HiRED, or tokenprune check file.py:Class")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OneTokenWarning)  # the checks themselves use a budget of one token
        report = check_reducer(options.reducer, options.families)
    if options.json:
        print(json.dumps({"passed": report.passed, **asdict(report)}))
    else:
        print_report(report)
    return 0 if report.passed else 1
