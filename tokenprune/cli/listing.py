"""The rows and output formats of `tokenprune list`, and the output of `tokenprune check`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tokenprune.adapter import Adapter
from tokenprune.catalog import adapters, find_kind
from tokenprune.cli.parsing import load_classes, presets
from tokenprune.component_reducer import ComponentReducer
from tokenprune.display import align_columns
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.image import APPLICATION_SIGNALS, BEFORE_TOWER, LLM_SIGNALS, STEP_SIGNALS, TEXT_SIGNALS, Signal
from tokenprune.image_reducer import ImageReducer
from tokenprune.reducer import TokenReducer
from tokenprune.registry import PLUGIN_PREFIX
from tokenprune.saliency import resolve_attention_source
from tokenprune.stages import STAGE_ORDER
from tokenprune.testing.conformance import Report
from tokenprune.testing.examples import build_example

Row = Mapping[str, str]


def first_line(member: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(member) or "").split("\n")[0]


def parameters(member: type) -> str:
    """Return the parameters of a dataclass with their defaults, as text."""
    parts = []
    for field in (field for field in dataclasses.fields(member) if field.init):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = type(default).__name__ if dataclasses.is_dataclass(default) else repr(default)
        parts.append(field.name if default is dataclasses.MISSING else f"{field.name}={text}")
    return ", ".join(parts)


def strategy_rows(plugins: Sequence[str] = ()) -> list[Row]:
    """Return a row for each strategy, plug-in files included, in the order of the stages."""
    classes, _ = load_classes(plugins)
    return [
        {
            "name": name,
            "description": first_line(member),
            "stage": str(member.stage),
            "needs": _describe_needs(member),
            "dropped tokens": _describe_dropped(member),
            "budget": "exact" if member.exact else "upper limit",
            "paper": member.published,
            "presets": ", ".join(f"{name}.{preset}" for preset in presets(member)),
            "parity": member.parity,
            "parameters": parameters(member),
        }
        for name, member in sorted(classes.items(), key=lambda item: (_find_stage(item[1]), item[0].lower()))
    ]


def _find_stage(member: type[TokenReducer]) -> int:
    """Return the place of a strategy's stage in the order of the stages; a composition comes last."""
    name = member.stage.name
    return STAGE_ORDER.index(name) if name in STAGE_ORDER else len(STAGE_ORDER)


def _build_default(member: type[TokenReducer]) -> TokenReducer | None:
    """Return a strategy with default parameters; None if a parameter has no default."""
    needs_values = any(
        field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for field in dataclasses.fields(member)
    )
    return None if needs_values else member()


def _describe_needs(member: type[TokenReducer]) -> str:
    reducer = _build_default(member)
    if reducer is None:
        return "depends on its parameters"
    return ", ".join(sorted({_format_signal(signal) for signal in reducer.needs})) or "features"


def _format_signal(signal: Signal) -> str:
    return signal.kind if signal.kind in TEXT_SIGNALS | APPLICATION_SIGNALS else f"{signal.kind}({signal.layer})"


def _describe_dropped(member: type[TokenReducer]) -> str:
    reducer = _build_default(member)
    if reducer is None:
        return "depends on its parameters"
    if isinstance(reducer, ImageReducer):
        return "not encoded"
    if isinstance(reducer, EncoderReducer):
        return "merged" if reducer.merges else "dropped"
    return "merged" if isinstance(reducer, ComponentReducer) and reducer.merging is not None else "dropped"


def component_rows(plugins: Sequence[str] = ()) -> list[Row]:
    """Return a row for each component, sorted by kind, plug-in files included."""
    _, classes = load_classes(plugins)
    return [
        {
            "name": name,
            "description": first_line(member),
            "kind": find_kind(member),
            "import": describe_import(member),
            "parameters": parameters(member),
        }
        for name, member in sorted(classes.items(), key=lambda item: (find_kind(item[1]), item[0]))
    ]


def describe_import(component: type) -> str:
    """Return the import statement of a component; for a class of a user's file, its name on the command line.

    Args:
        component: the class.
    """
    module, name = component.__module__, component.__name__
    if module.startswith(PLUGIN_PREFIX):
        return f"{inspect.getsourcefile(component)}:{name}"
    package = "tokenprune.strategies.components" if module.startswith("tokenprune.strategies.") else module
    return f"from {package} import {name}"


def model_rows(plugins: Sequence[str] = ()) -> list[Row]:
    """Return a row for each model family; the signals are read from the example model of the adapter.

    If a plug-in adapter has no example, its row names no signals.
    """
    rows: list[Row] = []
    for name, adapter_class in sorted(adapters().items(), key=lambda item: item[1].family):
        provides = _read_signals(adapter_class)
        rows.append(
            {
                "family": adapter_class.family,
                "description": first_line(adapter_class),
                "class": adapter_class.model_class,
                "adapter": name,
                "attention": resolve_attention_source("auto", provides) if provides else "",
                "stages": ", ".join(
                    ["image"] * bool(provides & BEFORE_TOWER)
                    + _describe_encoder_stage(adapter_class)
                    + ["projector"]
                    + ["decoder"] * (provides >= LLM_SIGNALS)
                ),
                "signals": ", ".join(sorted(provides - LLM_SIGNALS - STEP_SIGNALS - BEFORE_TOWER)),
                "verified": describe_verification(name),
            }
        )
    return rows


def _describe_encoder_stage(adapter_class: type[Adapter]) -> list[str]:
    """Return the stage inside the vision tower with the steps that a family supports; empty if it supports none."""
    steps = sorted(adapter_class.patch_steps)
    return [f"encoder ({' and '.join(steps)})"] if steps else []


def _read_signals(adapter_class: type[Adapter]) -> frozenset[str]:
    """Return the signals of the example model of an adapter; empty if it has no example."""
    try:
        adapter: Adapter = build_example(adapter_class).adapter
    except LookupError:
        return frozenset()
    return adapter.provides


def describe_verification(adapter: str) -> str:
    """Return a summary of the tests of an adapter, from ``verified.json``, which the tests write.

    Args:
        adapter: class name of the adapter.
    """
    matrix = json.loads((files("tokenprune.models") / "verified.json").read_text(encoding="utf-8"))
    names: dict[str, list[str]] = {}
    for row in matrix["families"].get(adapter, ()):
        done = len(matrix["checks"]) - len(set(row["skip"]) & set(matrix["checks"]))
        parts = [
            f"{done} of {len(matrix['checks'])} checks",
            "100 %: identical" if row["full"] == 0 else f"100 %: within {row['full']:g}",
            "masked prompt: not equal" if row["oracle"] is None else f"masked prompt: within {row['oracle']:g}",
            *([] if row["beams"] else ["no beams"]),
            *([row["why"].rstrip(".")] if row["why"] else []),
        ]
        names.setdefault("; ".join(parts), []).append(row["name"])
    if len(names) == 1:
        return next(iter(names))
    if adapter in matrix["own"]:
        return f"tests of its own, {matrix['own'][adapter]}"
    return ". ".join(f"{', '.join(members)}: {text}" for text, members in names.items()) or "not in the matrix of tests"


KINDS: dict[str, Callable[[Sequence[str]], list[Row]]] = {
    "strategies": strategy_rows,
    "components": component_rows,
    "models": model_rows,
}


COMPACT: Mapping[str, Sequence[str]] = {
    "strategies": ("name", "stage", "description"),
    "components": ("name", "kind", "description"),
    "models": ("family", "class", "stages"),
}
"""Columns of the compact table of each kind."""


def format_json(rows: Sequence[Row]) -> str:
    """Return rows as a JSON list."""
    return json.dumps([dict(row) for row in rows], indent=1)


def as_markdown(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table without parameters and imports; names in code font, papers with arXiv links."""
    columns = [name for name in rows[0] if name not in ("parameters", "import")]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        settings = [
            f"`{row[name]}`" if name in ("name", "family") else row[name].replace("|", "or") for name in columns
        ]
        lines.append(f"| {' | '.join(settings)} |")
    return re.sub(r"arXiv (\d{4}\.\d{5}(?:v\d+)?)", r"[arXiv \1](https://arxiv.org/abs/\1)", "\n".join(lines))


def print_report(report: Report) -> None:
    """Print a conformance report, one line per check."""
    console = Console()
    marks = {True: "[green]ok  [/green]", False: "[red]FAIL[/red]", None: "[dim]-   [/dim]"}
    for result in report.results:
        detail = f": {escape(result.detail)}" if result.detail else ""
        console.print(f"{marks[result.passed]} {result.name}{detail}", soft_wrap=True, highlight=False)
    verdict = "[green]meets the contract[/green]" if report.passed else "[red]breaks the contract[/red]"
    console.print(f"{report.strategy} {verdict}")


def print_compact(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Print one line per row with some of its columns; lines are cut only in a terminal.

    Args:
        rows: the rows.
        columns: names of the columns.
    """
    console, texts = Console(), [list(columns), *([row[name] for name in columns] for row in rows)]
    for line in align_columns(texts).splitlines():
        console.print(Text(line), no_wrap=True, overflow="ellipsis") if console.is_terminal else print(line)


def print_table(rows: Sequence[Row]) -> None:
    """Print each row: its name, its description, and its further entries."""
    table = Table(box=None, show_header=False, padding=(0, 2, 1, 0))
    for row in rows:
        name, description, *values = (escape(value) for value in row.values())
        details = [f"[dim]{key}:[/dim] {value}" for key, value in zip(list(row)[2:], values, strict=True) if value]
        table.add_row(f"[bold]{name}[/bold]", "\n".join([description, *details]))
    Console().print(table)
