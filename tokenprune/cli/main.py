"""The command line: `tokenprune COMMAND`. A command is imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

USAGE = """usage: tokenprune COMMAND [OPTIONS]

commands:
  run       answer questions about images, with all visual tokens and with a strategy, side by side
  evaluate  run one experiment and write a record a sample
  ablate    run a grid of experiments, with baselines; the same command goes on after a stop
  report    tables and figures of a run directory
  sweep     run a W&B sweep file here, without an account
  list      list what is known by name: strategies, components, models
  check     check that a strategy keeps the promises of the library
  bench     measure speed, memory and FLOPs phase by phase (run), or what strategies cost (strategies)
  cost      count FLOPs and bytes of a model without running it; predict time and memory on devices

`tokenprune COMMAND --help` says more; --version prints the version; --debug shows tracebacks."""

COMMANDS = ("run", "evaluate", "ablate", "report", "sweep", "list", "check", "bench", "cost")
"""The commands; the module `tokenprune.cli.COMMAND` runs each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `tokenprune`; those of the process if left out.

    Returns:
        The exit code: 0, 1 if a check failed, 2 for an error that the user can mend, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["--version"]:
        from tokenprune import __version__

        print(f"tokenprune {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    try:
        if words[0] not in COMMANDS:
            raise ValueError(f"there is no command {words[0]!r}; the commands are {', '.join(COMMANDS)}")
        run = import_module(f"tokenprune.cli.{words[0]}").run
        # A sweep runs other commands. It receives this function, because its module cannot import this one.
        return (run(words[1:], main) if words[0] == "sweep" else run(words[1:])) or 0
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
        text = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, (ValueError, LookupError, TypeError, OSError, RuntimeError))
        hint = "" if known else f" ({type(error).__name__}; --debug shows where)"
        print(f"tokenprune: {text}{hint}", file=sys.stderr)
        return 2
