"""One entry to a live model: only the execution path generates, places hooks, or passes features on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tokenprune", "strategies", "models", "experiments")

GENERATES = {
    "tokenprune/pipeline.py": "calls it",
    "tokenprune/attach.py": "`_Generate` passes the call to the pipeline",
}
"""Files that may call `generate` of a model."""
HOOKS = {
    "tokenprune/attach.py": "hooks of plain calls",
    "tokenprune/pipeline.py": "counts the passes through a tower",
    "models/probe.py": "captures signals while the tower runs",
    "models/truncation.py": "leaves the tower early",
    "models/placeholder.py": "captures the inputs of the projector",
    "models/mllama.py": "shortens the cross-attention mask during a call",
    "models/phi4_multimodal.py": "lets the embedding module take features during a call",
    "strategies/components/second_look.py": "hooks its own second model",
}
"""Files that may place hooks, or replace a `forward`."""
PASSES_FEATURES = {"tokenprune/pipeline.py", "tokenprune/adapter.py", "models"}
"""Files that may turn features into model inputs; adapters call the method of their base."""


def calls(source: str) -> Iterator[tuple[str, str]]:
    """Yield the name of every called attribute or function, with the object that it is called on."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr, ast.unparse(node.func.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, ""


def is_hook(name: str) -> bool:
    return (name.startswith("register_") and name.endswith("_hook")) or name in ("replaced_forward", "exchanged_config")


def problems(file: str, source: str) -> list[str]:
    """The calls in a file that belong to the execution path."""
    out = []
    for name, owner in calls(source):
        if name == "generate" and owner not in ("", "self.pipeline") and file not in GENERATES:
            out.append(f"{file} calls {owner}.generate; use tokenprune.pipeline.call_generate or a Pipeline")
        if is_hook(name) and file not in HOOKS:
            out.append(f"{file} calls {name}; hooks belong to the adapters and to attach.py")
        allowed = file in PASSES_FEATURES or file.split("/")[0] in PASSES_FEATURES
        if name in ("features_to_inputs", "complete_inputs") and not allowed:
            out.append(f"{file} calls {name}; use Pipeline.prepare")
    return out


def sources() -> dict[str, str]:
    files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py") if not f.is_symlink()]
    return {f.relative_to(ROOT).as_posix(): f.read_text() for f in files if "tokenprune/models/" not in f.as_posix()}


@pytest.mark.parametrize("file", sorted(sources()))
def test_one_entry(file: str) -> None:
    assert problems(file, sources()[file]) == []


def test_the_lists_name_files_that_exist() -> None:
    assert set(sources()) >= {*GENERATES, *HOOKS}


def test_the_scan_finds_a_second_entry() -> None:
    wrong = "def f(model, adapter, x):\n    model.register_forward_pre_hook(x)\n    adapter.features_to_inputs(x, x)\n"
    assert len(problems("experiments/other.py", wrong + "    return model.generate(x)\n")) == 3
    assert problems("experiments/other.py", '"""model.generate(x)"""\nmodel.config\n') == []
