"""The command `tokenprune run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout

from jsonargparse import ArgumentParser

from tokenprune.cli.demo import Request, answer_all, format_json, print_table
from tokenprune.cli.errors import INPUT_ERRORS, add_flag, user_error
from tokenprune.cli.parsing import prepare
from tokenprune.configuration import as_config
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import HiRED


def run_parser() -> ArgumentParser:
    """Return the parser of `tokenprune run`."""
    parser = ArgumentParser(
        prog="tokenprune run",
        exit_on_error=False,
        allow_abbrev=False,
        description="Answer questions about images with all visual tokens and with a strategy, side by side.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--plugin", type=list[str], default=[], help="Python files with further strategies")
    parser.add_argument("--model", default="mini", help="mini (embedded), a checkpoint folder, or a hub id")
    parser.add_argument("--image", type=str, nargs="+", help="image files; by default the bundled board")
    parser.add_argument("--question", type=str, nargs="+", help="questions; each is asked about each image")
    parser.add_argument(
        "--reducer",
        type=TokenReducer,
        default={"class_path": f"{HiRED.__module__}.{HiRED.__qualname__}"},
        help="strategy: a class name (HiRED, hired), a preset (HiRED.release) or file.py:Class; its parameters follow "
        "as --reducer.NAME, e.g. --reducer.budget 0.2 or 20%% (ratio), --reducer.budget 160 (tokens), "
        "--reducer.selection RandomSelection --reducer.selection.seed 3",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer in tokens")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs for the time to first token")
    parser.add_argument("--out", default="tokenprune-out", help="folder for the overlay")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", help="auto (float32 on a CPU), float32, bfloat16, float16")
    add_flag(parser, "--json", "print one JSON object: the fields of the first answer, and all answers under `results`")
    return parser


def run(argv: Sequence[str]) -> None:
    """Run the command `run`."""
    parser = run_parser()
    try:
        options = parser.instantiate(parser.parse_args(prepare(argv)))
    except INPUT_ERRORS as error:
        raise user_error(error, parser) from error

    request = Request(
        model=options.model,
        images=options.image,
        questions=options.question,
        reducer=options.reducer,
        max_new_tokens=options.max_new_tokens,
        repeats=options.repeats,
        out=options.out,
        device=options.device,
        dtype=options.dtype,
    )
    # A user's strategy may print. With --json, stdout must hold only the JSON object.
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        answers = answer_all(request)
    if options.json:
        print(format_json(request, as_config(options.reducer), answers))
    else:
        print_table(request, answers)
