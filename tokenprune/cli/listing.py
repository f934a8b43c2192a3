"""What `tokenprune list` shows."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenprune.catalog import adapters
from tokenprune.cli.parsing import presets, with_plugins
from tokenprune.image import TEXT_SIGNALS, USED_WHEN_ATTACHED, Signal
from tokenprune.policies import (
    AllocationPolicy,
    Component,
    MergingPolicy,
    OrderPolicy,
    RelevancePolicy,
    SelectionPolicy,
)
from tokenprune.reducer import ComponentReducer, ImageReducer, TokenReducer
from tokenprune.saliency import SaliencyModel, attention_source
from tokenprune.testing.conformance import Report

Row = Mapping[str, str]


def first_line(member: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(member) or "").split("\n")[0]


def parameters(member: type) -> str:
    """Return the parameters of a dataclass with their defaults."""
    parts = []
    for field in dataclasses.fields(member):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = type(default).__name__ if dataclasses.is_dataclass(default) else repr(default)
        parts.append(field.name if default is dataclasses.MISSING else f"{field.name}={shown}")
    return ", ".join(parts)


def strategy_rows(plugins: Sequence[str] = ()) -> list[Row]:
    """Return all strategies, those of the user's files included."""
    known, _ = with_plugins(plugins)
    return [
        {
            "name": name,
            "what": first_line(found),
            "stage": str(found.stage),
            "needs": ", ".join(sorted({_signal(signal) for signal in found().needs})) or "features",
            "dropped tokens": _dropped(found()),
            "budget": "exact" if found.exact else "a ceiling",
            "paper": found.published,
            "presets": ", ".join(f"{name}.{preset}" for preset in presets(found)),
            "parity": found.parity,
            "parameters": parameters(found),
        }
        for name, found in sorted(known.items(), key=lambda item: item[0].lower())
    ]


def _signal(signal: Signal) -> str:
    return signal.kind if signal.kind in TEXT_SIGNALS | USED_WHEN_ATTACHED else f"{signal.kind}({signal.layer})"


def _dropped(reducer: TokenReducer) -> str:
    if isinstance(reducer, ImageReducer):
        return "never made"
    return "merged" if isinstance(reducer, ComponentReducer) and reducer.merging is not None else "dropped"


def component_rows(plugins: Sequence[str] = ()) -> list[Row]:
    """Return all parts by kind, those of the user's files included."""
    _, known = with_plugins(plugins)
    return [
        {
            "name": name,
            "what": first_line(found),
            "kind": _kind(found),
            "parameters": parameters(found),
        }
        for name, found in sorted(known.items(), key=lambda item: (_kind(item[1]), item[0]))
    ]


COMPONENT_KINDS: Mapping[str, type[Component]] = {
    "allocation": AllocationPolicy,
    "selection": SelectionPolicy,
    "merging": MergingPolicy,
    "relevance": RelevancePolicy,
    "order": OrderPolicy,
    "second look": SaliencyModel,
}


def _kind(component: type[Component]) -> str:
    return next((kind for kind, base in COMPONENT_KINDS.items() if issubclass(component, base)), "other")


def model_rows(plugins: Sequence[str] = ()) -> list[Row]:
    """Return all model families; signals are those of the tower of the adapter's example."""
    rows: list[Row] = []
    for name, found in sorted(adapters().items(), key=lambda item: item[1].family):
        provides = found(found.example()).provides
        rows.append(
            {
                "family": found.family,
                "what": first_line(found),
                "class": found.model_class,
                "adapter": name,
                "attention": attention_source("auto", provides),
                "stages": ", ".join(["image"] * ("resolution" in provides) + ["projector"]),
                "signals": ", ".join(sorted(provides - {"resolution"})),
                "verified": verified(name),
            }
        )
    return rows


def verified(adapter: str) -> str:
    """Return what the tests check of an adapter, from the file that is made of them.

    Args:
        adapter: its class name.
    """
    said = json.loads((files("tokenprune.models") / "verified.json").read_text(encoding="utf-8"))
    names: dict[str, list[str]] = {}
    for row in said["families"].get(adapter, ()):
        done = len(said["checks"]) - len(set(row["skip"]) & set(said["checks"]))
        parts = [
            f"{done} of {len(said['checks'])} checks",
            "100 %: identical" if row["full"] == 0 else f"100 %: within {row['full']:g}",
            "masked prompt: not equal" if row["oracle"] is None else f"masked prompt: within {row['oracle']:g}",
            *([] if row["beams"] else ["no beams"]),
            *([row["why"].rstrip(".")] if row["why"] else []),
        ]
        names.setdefault("; ".join(parts), []).append(row["name"])
    if len(names) == 1:
        return next(iter(names))
    if adapter in said["own"]:
        return f"tests of its own, {said['own'][adapter]}"
    return ". ".join(f"{', '.join(own)}: {text}" for text, own in names.items()) or "not in the matrix of tests"


KINDS: dict[str, Callable[[Sequence[str]], list[Row]]] = {
    "strategies": strategy_rows,
    "components": component_rows,
    "models": model_rows,
}


def as_json(rows: Sequence[Row]) -> str:
    """Return rows as a JSON list."""
    return json.dumps([dict(row) for row in rows], indent=1)


def as_markdown(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table without their parameters; names in code font."""
    columns = [name for name in rows[0] if name != "parameters"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        settings = [
            f"`{row[name]}`" if name in ("name", "family") else row[name].replace("|", "or") for name in columns
        ]
        lines.append(f"| {' | '.join(settings)} |")
    return "\n".join(lines)


def print_report(report: Report) -> None:
    """Print a conformance report, a line per check."""
    console = Console()
    marks = {True: "[green]ok  [/green]", False: "[red]FAIL[/red]", None: "[dim]-   [/dim]"}
    for result in report.results:
        detail = f": {escape(result.detail)}" if result.detail else ""
        console.print(f"{marks[result.passed]} {result.name}{detail}", soft_wrap=True, highlight=False)
    verdict = "[green]keeps all promises[/green]" if report.passed else "[red]breaks a promise[/red]"
    console.print(f"{report.strategy} {verdict}")


def as_table(rows: Sequence[Row]) -> None:
    """Print each row as its name, what it is, and its other entries."""
    table = Table(box=None, show_header=False, padding=(0, 2, 1, 0))
    for row in rows:
        name, what, *rest = (escape(value) for value in row.values())
        details = [f"[dim]{key}:[/dim] {value}" for key, value in zip(list(row)[2:], rest, strict=True) if value]
        table.add_row(f"[bold]{name}[/bold]", "\n".join([what, *details]))
    Console().print(table)
