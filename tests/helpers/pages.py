"""Functions that read code blocks of the documentation, and check the commands in them without running them."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from jsonargparse import ArgumentParser
from PIL import Image

from tokenprune.cli.main import COMMANDS, main
from tokenprune.cli.options import parse_reducer
from tokenprune.experiments.evaluation.grid import expand, load_config
from tokenprune.experiments.tracking.sweep_file import read_sweep

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:tokenprune|python -m) [a-z][^`]*)`")
PLACEHOLDER = re.compile(r"\b(DIR|FILE|NAME|PROJECT|COMMAND)\b|\.\.\.")
"""Words of a command inside a sentence that stand for a value of the reader."""
COMPARED = "--compare"
"""The option of `tokenprune report` with the names of two settings."""
PROGRAMS = ("accelerate", "mkdocs", "pip", "pytest", "python", "tokenprune", "torchrun", "wandb")
"""Programs that pages call."""
REPOSITORY = ("docs", "examples", "experiments", "research")
"""Folders that commands and code of pages read."""
OUTPUTS = {"run.yaml": "reducer: HiRED\n"}
"""Files that earlier commands of pages write."""
IMAGES = ("photo.jpg", "my_data/a.png")
"""Images of the reader."""


class Block(NamedTuple):
    """A code block of a page.

    Args:
        language: the language, empty if the block has none.
        file: the file name that the title of the block gives, or an empty text.
        text: the code.
    """

    language: str
    file: str
    text: str


class ParsedError(BaseException):
    """The options of a command are parsed; the command itself does not run."""


def read_blocks(page: str) -> list[Block]:
    """Return the code blocks of a page.

    Args:
        page: path of the page, relative to the repository.
    """
    text = (ROOT / page).read_text()
    blocks = [Block(*match) for match in BLOCK.findall(text)]
    assert 2 * len(blocks) == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{page}: a code block is not closed"
    return blocks


def read_python(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    return [block.text for block in read_blocks(page) if block.language == "python"]


def enter_folder(page: str, folder: Path) -> None:
    """Write the files whose content a page shows into a folder, and link the folders of the repository."""
    for name in REPOSITORY:
        (folder / name).symlink_to(ROOT / name)
    shown = {block.file: block.text for block in read_blocks(page) if block.file}
    for file, text in (OUTPUTS | shown).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    for file in IMAGES:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(folder / file)


def expand_commands(script: str, folder: Path) -> list[list[str]]:
    """Return the words of each command of a shell script, as bash passes them to the programs.

    The script runs in bash, with programs that only record their arguments. An unknown program raises an error.

    Args:
        script: the lines of one or several shell blocks.
        folder: a folder that does not exist, for the recorded arguments.
    """
    programs, log, bash = folder / "bin", folder / "log", str(shutil.which("bash"))
    programs.mkdir(parents=True)
    log.touch()
    for name in PROGRAMS:
        program = programs / name
        program.write_text(f'#!{bash}\nprintf "%s\\0" {name} "$@" $\'\\n\' >> "{log}"\n')
        program.chmod(0o755)
    environment = {"PATH": str(programs), "HOME": str(folder)}
    command = [bash, "-c", f"set -euo pipefail\n{script}"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{script}: {result.stderr}"
    return [line.rstrip("\0").split("\0") for line in log.read_text().split("\n\0") if line]


def needs_other_machines(words: Sequence[str]) -> bool:
    """Return whether a command needs a GPU, the hub, a large model, a server or another environment."""
    text = " ".join(words)
    if words[0] not in ("tokenprune", "python") or words[1:2] == ["demo"] or words[1:3] == ["-m", "lmms_eval"]:
        return True
    if "configs/hired/" in text:
        return "--dry-run" not in words
    large = ("llava-hf/", "/models/", "cuda", "llava_next_gpu", "bench run --model llava", "TimmSaliency")
    return any(name in text for name in large)


def read_inline_commands(page: str) -> list[str]:
    """Return the commands in sentences and tables of a page that name all their values."""
    text = BLOCK.sub("", (ROOT / page).read_text())
    return [" ".join(command.split()) for command in INLINE.findall(text) if not PLACEHOLDER.search(command)]


def parse_command(words: Sequence[str]) -> None:
    """Parse a command of a page with the parser of its program, without running it.

    Args:
        words: program and arguments.

    Raises:
        AssertionError: if the command is not valid.
    """
    program, *arguments = words
    if program in ("torchrun", "accelerate"):
        module = arguments.index("-m")
        program, arguments = "python", arguments[module:]
    if program == "python" and arguments[:2] == ["-m", "tokenprune"]:
        program, arguments = "tokenprune", arguments[2:]
    if program == "tokenprune":
        parse_tokenprune(arguments)
    elif program == "python":
        parse_python(arguments)
    elif program == "pip":
        extras = set(re.findall(r"\[([\w,]+)\]", " ".join(arguments)))
        declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        assert {extra for group in extras for extra in group.split(",")} <= declared, words
    elif words[:2] == ["wandb", "sweep"]:
        read_sweep(arguments[1])
    else:
        assert words[:2] in (["wandb", "agent"], ["wandb", "sync"], ["mkdocs", "serve"]) or program == "pytest", words


def parse_tokenprune(arguments: Sequence[str]) -> None:
    """Parse the arguments of `tokenprune`, and read the files that they name."""
    if arguments[0] == "--version" or "--help" in arguments or arguments in ([command] for command in COMMANDS):
        return
    if "--print_config" not in arguments:
        with stop_after("instantiate"):
            code = main(["--debug", *arguments])
            raise AssertionError(f"tokenprune {' '.join(arguments)} returned {code} before its options were parsed")
    if arguments[0] == "ablate" and not arguments[1].startswith("experiments/"):  # test_ablations.py reads those
        assert expand(load_config(arguments[1]))
    if arguments[0] == "sweep":
        read_sweep(arguments[1])


def parse_python(arguments: Sequence[str]) -> None:
    """Parse the arguments of a module or a file, whose program uses jsonargparse."""
    if arguments[:2] == ["-m", "lmms_eval"]:
        options = dict(zip(arguments[2::2], arguments[3::2], strict=False))
        model_args = dict(pair.split("=", 1) for pair in options["--model_args"].split(","))
        assert options["--model"] == "tokenprune"
        assert parse_reducer(["--reducer", model_args["reducer"], "--reducer.budget", model_args["budget"]])
        return
    is_module = arguments[0] == "-m"
    name, options = (arguments[1], arguments[2:]) if is_module else (arguments[0], arguments[1:])
    assert find_spec(name) if is_module else Path(name).is_file(), name
    if options:
        with stop_after("parse_args"), mock.patch.object(sys, "argv", [name, *options]):
            runpy.run_module(name, run_name="__main__") if is_module else runpy.run_path(name, run_name="__main__")
            raise AssertionError(f"{name} did not parse {options}")


@contextmanager
def stop_after(method: str) -> Iterator[None]:
    """Stop the code of the block at the end of the first call of a method of jsonargparse's parser.

    Args:
        method: ``"parse_args"``, or ``"instantiate"``, which also builds the objects of the options.
    """
    original, depth = getattr(ArgumentParser, method), 0

    def call_and_stop(parser: ArgumentParser, *arguments: Any, **options: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            result = original(parser, *arguments, **options)
        finally:
            depth -= 1
        if depth == 0:
            raise ParsedError
        return result

    with mock.patch.object(ArgumentParser, method, call_and_stop):
        try:
            yield
        except ParsedError:
            return
