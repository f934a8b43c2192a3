"""The command `tokenprune run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout

from tokenprune.cli.answers import RunConfig, answer_all, format_json, print_table
from tokenprune.cli.errors import UserError
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.cli.status import show_status


def run(argv: Sequence[str]) -> None:
    """Run the command `run`."""
    description = "Answer questions about images with all visual tokens and with a strategy, side by side."
    parser = build_parser("tokenprune run", description, RunConfig, file=True)
    config = select_fields(RunConfig, parse_options(parser, argv, {}))
    # A user's strategy may print. With --json, stdout must hold only the JSON object.
    with redirect_stdout(sys.stderr) if config.json else nullcontext(), show_status("loading the model, and answering"):
        answers = answer_all(config)
    if config.json:
        print(format_json(config, answers))
    else:
        print_table(config, answers)
    if error := next((entry.file_error for entry in answers if entry.file_error), None):
        raise UserError(error)
