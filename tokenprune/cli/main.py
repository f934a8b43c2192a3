"""The command line: `tokenprune COMMAND`. A command is imported when it runs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module

from tokenprune.cli.help import read_help
from tokenprune.cli.status import pause_garbage_collection, print_short_warnings, show_status
from tokenprune.source_code import locate_error

USAGE = """usage: tokenprune COMMAND [OPTIONS]

commands:
  run       answer questions about images, with all visual tokens and with a strategy, side by side
  demo      try strategies on images in the browser (extra: demo)
  evaluate  run one experiment and write one record per sample
  ablate    run a grid of experiments, with baselines; repeat the command to continue after a stop
  report    write tables and figures of a run directory
  sweep     run a W&B sweep file here, without an account
  encode    write the kept visual tokens of images to a file, for a server that runs the LLM
  list      list strategies, components or models
  check     check a strategy against the contract of the library
  bench     measure speed, memory and FLOPs of each phase (run), or the cost of strategies (strategies)
  cost      count FLOPs and bytes of a model without running it; predict time and memory on devices

`tokenprune COMMAND --help` prints its options; --version prints versions; --debug shows tracebacks."""

COMMANDS = ("run", "demo", "evaluate", "ablate", "report", "sweep", "encode", "list", "check", "bench", "cost")
"""The commands; the module `tokenprune.cli.COMMAND` runs each."""


@cache
def freeze_loaded_objects() -> None:
    """Exclude all objects from garbage collection, once per process.

    Modules stay until the exit. Otherwise garbage collection searches all objects of torch and transformers several
    times, also at the exit, which takes more than a second. Later commands of the process, such as the runs of a
    sweep, must not freeze the garbage of earlier ones.
    """
    gc.freeze()


def run_command(arguments: Sequence[str]) -> int:
    """Import and run a command, and return its exit code.

    Args:
        arguments: the command and its arguments.

    Raises:
        ValueError: if there is no such command.
    """
    if arguments[0] not in COMMANDS:
        raise ValueError(f"there is no command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}")
    if not {"-h", "--help"} & set(arguments):  # the help needs no time for the check
        from tokenprune.dependencies import check_dependencies

        check_dependencies()
    with show_status("loading torch and transformers"), pause_garbage_collection():
        run = import_module(f"tokenprune.cli.{arguments[0]}").run
    freeze_loaded_objects()
    # A sweep runs other commands. It receives `main`, because its module cannot import this one.
    return (run(arguments[1:], main) if arguments[0] == "sweep" else run(arguments[1:])) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after `tokenprune`; by default the arguments of the process.

    Returns:
        The exit code: 0, 1 if a check failed, 2 after an error, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    if arguments[:1] == ["--version"]:
        from tokenprune.dependencies import format_versions

        print(format_versions())
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if (text := read_help(arguments)) is not None:
        print(text, end="")
        return 0
    try:
        with nullcontext() if debug else print_short_warnings():
            return run_command(arguments)
    except SystemExit as stop:  # --help and --print_config of a command
        return int(stop.code or 0)
    except KeyboardInterrupt:
        if debug:
            raise
        print("tokenprune: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        if debug:
            raise
        from tokenprune.cli.errors import format_failure

        is_expected = isinstance(error, (ValueError, LookupError, TypeError, OSError, RuntimeError))
        hint = "" if is_expected else f" ({type(error).__name__}; --debug shows where)"
        place = locate_error(error)
        print(f"tokenprune: {f'{place}: ' if place else ''}{format_failure(error)}{hint}", file=sys.stderr)
        return 2
