"""Examples are found by adapter class: shipped ones, plug-ins, and classes defined in the session."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tokenprune import registry
from tokenprune.adapter import Adapter
from tokenprune.cli import listing
from tokenprune.models.llava import LlavaAdapter
from tokenprune.strategies import HiRED
from tokenprune.testing import conformance, examples
from tokenprune.testing.examples import EXAMPLES, Example, build_example, find_example
from tokenprune.testing.families.llava import LlavaExample


class SessionAdapter(LlavaAdapter):
    """An adapter whose example is defined in this file."""


class SessionExample(LlavaExample):
    adapter_class = SessionAdapter


class PluginAdapter(LlavaAdapter):
    """An adapter without an example, unless a test registers one."""


def test_an_example_is_bound_to_an_adapter_of_its_class() -> None:
    assert type(build_example(LlavaAdapter).adapter) is LlavaAdapter
    assert find_example(SessionAdapter) is SessionExample
    assert type(build_example(SessionAdapter).adapter) is SessionAdapter


def test_examples_of_plugins_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not concrete, so that it is no example of the session.
    plugin = type("PluginExample", (Example,), {"adapter_class": PluginAdapter})
    points = {EXAMPLES: [SimpleNamespace(load=lambda: plugin)]}
    monkeypatch.setattr(registry, "entry_points", lambda group: points.get(group, []))
    examples._registered_examples.cache_clear()
    try:
        assert find_example(PluginAdapter) is plugin
    finally:
        examples._registered_examples.cache_clear()


def test_an_adapter_without_example_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks and the list of models run on the other adapters, and name the adapter."""
    tables: dict[str, type[Adapter]] = {"LlavaAdapter": LlavaAdapter, "PluginAdapter": PluginAdapter}
    with pytest.raises(LookupError, match=r"PluginAdapter has no example model.*docs/how-to/write-an-adapter\.md"):
        find_example(PluginAdapter)
    monkeypatch.setattr(conformance, "adapters", lambda: tables)
    report = conformance.check_reducer(HiRED())
    assert report.passed, str(report)
    results = {result.name: result for result in report.results}
    assert results["batch invariant"].passed
    assert results["leaves no trace"].passed
    assert results["runs on PluginAdapter"].passed is None
    assert "PluginAdapter has no example model" in results["runs on PluginAdapter"].detail
    monkeypatch.setattr(listing, "adapters", lambda: tables)
    signals = {row["adapter"]: row["signals"] for row in listing.model_rows()}
    assert "cls_attention" in signals["LlavaAdapter"]
    assert signals["PluginAdapter"] == ""
