"""Hooks of mkdocs: reference pages from the registry, and links of pages to files outside the documentation."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import tokenprune
from tokenprune.catalog import components, strategies
from tokenprune.cli.listing import as_markdown, component_rows, strategy_rows
from tokenprune.cli.main import COMMANDS, USAGE, main

ROOT = Path(__file__).parents[2]
SUBCOMMANDS = {"bench": ("run", "strategies")}


def list_api() -> dict[str, list[str]]:
    """Return the public names of the package by module."""
    modules = defaultdict(list)
    for name, module in sorted(tokenprune._MODULES.items()):
        modules[module].append(name)
    return dict(sorted(modules.items()))


def format_api_page(module: str, names: list[str]) -> str:
    """Return the page of a module: a section for each public name."""
    options = "    options: {show_root_full_path: false}"
    return "\n\n".join([f"# tokenprune.{module}", *(f"::: tokenprune.{module}.{n}\n{options}" for n in names)]) + "\n"


def format_classes(title: str, command: str, table: str, classes: Mapping[str, type]) -> str:
    """Return a page with a table of the registry and a section for each class."""
    sections = "\n\n".join(
        f"::: {cls.__module__}.{name}\n    options: {{members: false, show_root_full_path: false}}"
        for name, cls in sorted(classes.items())
    )
    note = f"`{command}` prints this table, with the plug-ins of your installation."
    return f"# {title}\n\n{note}\n\n{table}\n\n{sections}\n"


def format_strategies() -> str:
    """Return the page of all strategies."""
    table = as_markdown(strategy_rows())
    return format_classes("Strategies", "tokenprune list strategies", table, strategies())


def format_components() -> str:
    """Return the page of all components."""
    table = as_markdown(component_rows())
    return format_classes("Components", "tokenprune list components", table, components())


def format_signals() -> str:
    """Return the page of the signals, which are the methods of `EncodedImage`."""
    return (
        "# Signals\n\nA strategy declares in `needs` the signals that it reads.\n"
        "Each kind is a method of `EncodedImage`.\n"
        "[Models](models.md) lists the signals of each family.\n\n::: tokenprune.image.EncodedImage\n"
        "    options: {show_root_heading: false, show_root_toc_entry: false}\n"
    )


def read_help(*words: str) -> str:
    """Return the help of a command."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main([*words, "--help"])
    return "".join(letter for letter in text.getvalue() if letter.isprintable() or letter == "\n").strip()


def format_cli() -> str:
    """Return the page of the command line, with the help of each command."""
    words = [(command, *rest) for command in COMMANDS for rest in ((), *((s,) for s in SUBCOMMANDS.get(command, ())))]
    sections = [f"## {' '.join(word)}\n\n```text\n{read_help(*word)}\n```" for word in words]
    return "\n\n".join(["# Command line", f"```text\n{USAGE}\n```", *sections]) + "\n"


def format_examples() -> str:
    """Return the page with the scripts of `examples/`."""
    scripts = sorted((ROOT / "examples").glob("*.py"))
    return "# Examples\n\n" + "\n\n".join(f"## {s.name}\n\n```python\n{s.read_text()}```" for s in scripts) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/strategies.md": format_strategies,
    "reference/components.md": format_components,
    "reference/signals.md": format_signals,
    "reference/cli.md": format_cli,
    "reference/examples.md": format_examples,
}


def on_config(config: Any) -> Any:
    """Add the pages of the Python API to the navigation."""
    os.environ["COLUMNS"] = "84"  # width of the help of commands
    pages = [{module: f"reference/api/{module}.md"} for module in list_api()]
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    next(entry for entry in reference if "Python API" in entry)["Python API"] = pages
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    texts = {path: build() for path, build in PAGES.items()}
    texts |= {f"reference/api/{module}.md": format_api_page(module, names) for module, names in list_api().items()}
    for path, text in texts.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace links to files that are no pages: scripts link to their section, other files and folders become paths."""
    folder = (Path(config.docs_dir) / page.file.src_uri).parent

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = (folder / target.partition("#")[0]).resolve()
        is_page = path.is_relative_to(config.docs_dir) and not path.is_dir()
        if is_page or not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        if path.parent == ROOT / "examples" and path.suffix == ".py":
            start = os.path.relpath("reference/examples.md", Path(page.file.src_uri).parent)
            return f"[{text}]({start}#{path.name.replace('.', '')})"
        return f"{text} (`{path.relative_to(ROOT)}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^):\s]+)\)", replace, markdown)
