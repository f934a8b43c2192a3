"""Test the lookup of strategies, components, adapters and classes from files and entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenprune import registry
from tokenprune.adapter import ADAPTERS, Adapter, adapters, find_adapter
from tokenprune.catalog import STRATEGIES, components, strategies
from tokenprune.models.llava import LlavaAdapter
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.policies import (
    AllocationPolicy,
    Component,
    MergingPolicy,
    OrderPolicy,
    RelevancePolicy,
    SelectionPolicy,
)
from tokenprune.reducer import TokenReducer
from tokenprune.registry import collect_classes, find_class, load_from_file, to_kebab_case
from tokenprune.saliency import SaliencyModel
from tokenprune.strategies import HiRED
from tokenprune.strategies.components import TopAttentionSelection
from tokenprune.testing import tiny_models as tiny


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("HiRED", "hired"),
        ("TopAttentionSelection", "top-attention-selection"),
        ("GlobalTopAllocation", "global-top-allocation"),
        ("TopL2Norm", "top-l2-norm"),
        ("LLMFilter", "llm-filter"),
        ("FastV", "fastv"),
        ("Random", "random"),
    ],
)
def test_kebab_case_names(name: str, alias: str) -> None:
    assert to_kebab_case(name) == alias


@pytest.mark.parametrize("name", ["HiRED", "hired"])
def test_strategies_are_found_by_any_alias(name: str) -> None:
    assert find_class(name, strategies(), "strategy") is HiRED


@pytest.mark.parametrize(
    "name", ["TopAttentionSelection", "topattentionselection", "top-attention-selection", "top_attention_selection"]
)
def test_components_are_found_by_any_alias(name: str) -> None:
    assert find_class(name, components(), "component") is TopAttentionSelection


def test_aliases_are_unambiguous() -> None:
    for classes in (strategies(), components(), adapters()):
        aliases = [alias for name in classes for alias in registry._list_aliases(name)]
        assert len(aliases) == len(set(aliases))


KINDS = (AllocationPolicy, SelectionPolicy, MergingPolicy, RelevancePolicy, OrderPolicy, SaliencyModel)


def test_registered_classes() -> None:
    assert "HiRED" in strategies()
    assert not {"TokenReducer", "ScoreReducer", "ComponentReducer"} & set(strategies())
    assert {"UniformAllocation", "TopNormSelection", "VisualContentAllocation"} <= set(components())
    assert all(issubclass(component, KINDS) for component in components().values())
    assert {"LlavaAdapter", "LlavaNextAdapter"} <= set(adapters())
    assert "PlaceholderAdapter" not in adapters()


def test_unknown_names_suggest_similar_names() -> None:
    with pytest.raises(LookupError, match=r"no strategy is called 'hirde'. Did you mean HiRED.*Known: .*HiRED"):
        find_class("hirde", strategies(), "strategy")
    with pytest.raises(LookupError, match=r"Did you mean .*TopAttentionSelection"):
        find_class("TopAttenton", components(), "component")
    with pytest.raises(LookupError, match=r"no strategy is called 'zzzz'. Known"):
        find_class("zzzz", strategies(), "strategy")


PLUGIN = """
from dataclasses import dataclass
from tokenprune import ScoreReducer

@dataclass
class {name}(ScoreReducer):
    def score(self, image):
        return image.features.norm(dim=-1)
"""


def write_file(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_class_from_a_file(tmp_path: Path) -> None:
    path = write_file(tmp_path, "mine.py", PLUGIN.format(name="Loudest"))
    loudest = load_from_file(f"{path}:Loudest")
    assert issubclass(loudest, TokenReducer)
    assert load_from_file(f"{path}:Loudest") is loudest  # imported once
    assert find_class(f"{path}:Loudest", strategies(), "strategy") is loudest


def test_two_files_of_one_name_do_not_shadow_each_other(tmp_path: Path) -> None:
    first_path = write_file(tmp_path / "a", "same.py", PLUGIN.format(name="One"))
    second_path = write_file(tmp_path / "b", "same.py", PLUGIN.format(name="Two"))
    assert load_from_file(f"{first_path}:One").__name__ == "One"
    assert load_from_file(f"{second_path}:Two").__name__ == "Two"
    assert load_from_file(f"{first_path}:One").__name__ == "One"


def test_invalid_plugin_files_raise(tmp_path: Path) -> None:
    path = write_file(tmp_path, "plugin_a.py", PLUGIN.format(name="Loudest"))
    with pytest.raises(LookupError, match=r"no class 'Quietest'; it has Loudest"):
        load_from_file(f"{path}:Quietest")
    with pytest.raises(LookupError, match="is not a Python file"):
        load_from_file(f"{tmp_path}/missing.py:Loudest")
    empty = write_file(tmp_path, "plugin_b.py", "score = 3\n")
    with pytest.raises(LookupError, match="it has no class at all"):
        load_from_file(f"{empty}:score")
    broken = write_file(tmp_path, "plugin_c.py", "import no_such_module_anywhere\n")
    with pytest.raises(LookupError, match="cannot be imported: ModuleNotFoundError"):
        load_from_file(f"{broken}:Loudest")
    write_file(tmp_path, "plugin_c.py", PLUGIN.format(name="Loudest"))
    assert load_from_file(f"{broken}:Loudest")  # a corrected file is imported again


class PackageStrategy(HiRED):
    """A strategy of another installed package."""


def set_entry_points(monkeypatch: pytest.MonkeyPatch, **targets: str) -> None:
    def list_entry_points(*, group: str) -> list[EntryPoint]:
        return [EntryPoint(name, value, group) for name, value in targets.items()] if group == STRATEGIES else []

    monkeypatch.setattr(registry, "entry_points", list_entry_points)


def test_installed_plug_ins_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    set_entry_points(monkeypatch, own="tests.core.test_registry:PackageStrategy", hired="tokenprune.strategies:HiRED")
    classes = collect_classes(STRATEGIES, TokenReducer)
    assert classes["PackageStrategy"] is PackageStrategy
    assert classes["HiRED"] is HiRED  # two entry points name the same class
    assert "PackageStrategy" not in collect_classes(STRATEGIES, Component)
    assert "PackageStrategy" not in collect_classes(ADAPTERS, Adapter)


def test_two_classes_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    duplicate = type("HiRED", (HiRED,), {"__module__": "somewhere.else"})
    monkeypatch.setitem(globals(), "DuplicateHiRED", duplicate)
    set_entry_points(monkeypatch, hired="tests.core.test_registry:DuplicateHiRED")
    with pytest.raises(
        ValueError, match=r"two classes are called HiRED: tokenprune.strategies.hired and somewhere.else"
    ):
        collect_classes(STRATEGIES, TokenReducer)


def test_adapters_are_found_by_the_class_of_the_model() -> None:
    assert type(find_adapter(tiny.tiny_model("llava_next"))) is LlavaNextAdapter
    model: Any = tiny.tiny_model("llava")
    adapter = find_adapter(model)
    assert type(adapter) is LlavaAdapter
    assert adapter.model is model
    subclass = type("MyLlava", (type(model),), {})
    model.__class__ = subclass
    assert type(find_adapter(model)) is LlavaAdapter


def test_an_unsupported_model_lists_the_families() -> None:
    with pytest.raises(
        TypeError, match=r"no adapter supports Linear. Supported: .*llava \(LlavaForConditionalGeneration\)"
    ):
        find_adapter(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"llava_next \(LlavaNextForConditionalGeneration\)"):
        find_adapter(None)
