"""Hooks of mkdocs: reference pages from the registry, and links of pages to files outside the documentation."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from mkdocs.structure.files import File, Files

import tokenprune
from tokenprune.budget import Budget
from tokenprune.catalog import components, strategies
from tokenprune.cli.answers import RunConfig
from tokenprune.cli.listing import as_markdown, component_rows
from tokenprune.cli.main import COMMANDS, USAGE, main
from tokenprune.cli.options import read_field_docs
from tokenprune.configuration import as_config
from tokenprune.experiments.bench.command import BenchConfig
from tokenprune.experiments.evaluation.experiment import Experiment
from tokenprune.experiments.evaluation.grid import ABLATION_KEYS
from tokenprune.experiments.evaluation.records import RECORD_FIELDS
from tokenprune.experiments.evaluation.tasks import tasks
from tokenprune.policies import Configurable
from tokenprune.reducer import TokenReducer

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


def format_classes(classes: Mapping[str, type], package: str) -> str:
    """Return a section for each class, with its import.

    Args:
        classes: classes by name.
        package: package from which most of the classes are imported; other classes are imported from their module.
    """
    public = importlib.import_module(package)
    return "\n\n".join(
        f"::: {cls.__module__}.{name}\n    options: {{members: false, show_root_full_path: false}}\n\n"
        f"```python\nfrom {package if hasattr(public, name) else cls.__module__} import {name}\n```"
        for name, cls in sorted(classes.items())
    )


def format_components() -> str:
    """Return the page of all components: the table of the registry, and a section for each class."""
    sections = format_classes(components(), "tokenprune.strategies.components")
    note = "`tokenprune list components` prints this table, with the plug-ins of your installation."
    return f"# Components\n\n{note}\n\n{as_markdown(component_rows())}\n\n{sections}\n"


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


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "or") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_default(field: Field[Any]) -> str:
    """Return the default of a field in code font; objects with fields of their own as the name of their class."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is MISSING:
        return "required"
    return f"`{type(default).__name__ if isinstance(default, Configurable) else json.dumps(as_config(default))}`"


def format_type(hint: Any) -> str:
    """Return a type in code font, with class names without their modules, and literals as their values."""
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", inspect.formatannotation(hint))
    values = re.sub(r"Literal\[(.*?)\]", r"\1", text).replace("'", '"')
    return f"`{values[6:-1] if values.startswith('Union[') else values}`"


def format_fields(config: type) -> str:
    """Return a table with name, type, default and meaning of each field of a dataclass."""
    texts, hints = read_field_docs(config), get_type_hints(config)
    rows = [
        (f"`{field.name}`", format_type(hints[field.name]), format_default(field), texts[field.name])
        for field in fields(config)
        if field.init
    ]
    return format_table(("key", "type", "default", "meaning"), rows)


def format_yaml() -> str:
    """Return the page of the YAML files, from the dataclasses that read them."""
    ablation = format_table(("key", "meaning"), ((f"`{key}`", text) for key, text in ABLATION_KEYS.items()))
    return f"""# YAML files

The keys of a file are the options of a command. A value with fields of its own, such as a task, a strategy or a
component, is a class name, or a mapping: `{{class_path: Boards, init_args: {{number: 30}}}}`. A single field of it can
be a key: `task.number: 30`, `reducer.budget: 0.1`.

## Experiment

Read by `tokenprune evaluate --config FILE`, and by `tokenprune ablate FILE`.

{format_fields(Experiment)}

## Ablation

Further keys of `tokenprune ablate FILE` ([how to](../how-to/run-experiments.md)).

{ablation}

## Strategy

Fields of every strategy, below `reducer`. [Strategies](strategies.md) and [components](components.md) list further
fields.

{format_fields(TokenReducer)}

## Budget

A budget is a number, a text such as `"20%"`, or a mapping of these keys ([explanation](../explanation/budgets.md)).

{format_fields(Budget)}

## Tasks

{"".join(f"### {name}{chr(10) * 2}{format_fields(task)}{chr(10) * 2}" for name, task in sorted(tasks().items()))}
## Run

Read by `tokenprune run --config FILE`; `--print_config` writes such a file.

{format_fields(RunConfig)}

## Benchmark

Read by `tokenprune bench run --config FILE` ([how to](../how-to/benchmark.md)).

{format_fields(BenchConfig)}

Sweep files have the format of W&B ([how to](../how-to/wandb.md)).
"""


def format_records() -> str:
    """Return the page of the fields of a record."""
    return f"""# Record fields

One line of `settings/<hash>/records.jsonl` in a [run directory](../how-to/run-experiments.md#the-run-directory) is the
record of one question. Numbers of a failed sample are 0.

{format_table(("field", "meaning"), ((f"`{name}`", text) for name, text in RECORD_FIELDS.items()))}
"""


def format_examples() -> str:
    """Return the page with the scripts of `examples/`."""
    scripts = sorted((ROOT / "examples").glob("*.py"))
    return "# Examples\n\n" + "\n\n".join(f"## {s.name}\n\n```python\n{s.read_text()}```" for s in scripts) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/components.md": format_components,
    "reference/signals.md": format_signals,
    "reference/cli.md": format_cli,
    "reference/yaml.md": format_yaml,
    "reference/records.md": format_records,
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
    """Complete the page of the strategies, and replace links to files that are no pages.

    Links to scripts lead to their sections; other files and folders become paths.
    """
    if page.file.src_uri == "reference/strategies.md":
        markdown += f"\n{format_classes(strategies(), 'tokenprune.strategies')}\n"
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
