"""One entry to a live model: only the execution path generates, places hooks, or passes features on."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("tokenprune", "strategies", "models", "experiments")

ALLOWED: Mapping[str, Mapping[str, str]] = {
    "calls generate": {
        "tokenprune/pipeline.py": "calls that of the model",
        "tokenprune/generation.py": "calls the function that it is given",
    },
    "reads generate": {
        "tokenprune/pipeline.py": "keeps that of the model before anything is attached",
        "tokenprune/attach.py": "reads its signature, and restores it in copies of the model",
        "experiments/integrations/lmms_eval/model.py": "reports errors of it that the wrapper of lmms-eval would hide",
    },
    "replaces generate": {
        "tokenprune/attach.py": "places the one that passes calls to the pipeline",
        "experiments/integrations/lmms_eval/model.py": "reports errors of it that the wrapper of lmms-eval would hide",
    },
    "replaces forward": {
        "models/_capture/hooks.py": "`replaced_forward`",
        "models/_capture/truncated_tower.py": "skips layers",
        "models/mllama.py": "passes kept keys through the vision model during a call",
        "models/phi4_multimodal.py": "lets the embedding module take features during a call",
    },
    "places hooks": {
        "tokenprune/attach.py": "reduces plain calls",
        "tokenprune/pipeline.py": "counts the passes through a tower",
        "models/_capture/hooks.py": "captures signals while the tower runs",
        "models/_capture/truncated_tower.py": "leaves the tower early",
        "models/_base/placeholder.py": "captures the inputs of the projector",
        "models/mllama.py": "shortens the cross-attention mask during a call",
        "strategies/components/saliency_model.py": "hooks its own second model",
    },
    "passes features": {
        "tokenprune/pipeline.py": "passes them to the model",
        "tokenprune/adapter.py": "calls its own methods",
        "models/perception_lm.py": "calls the method of its base",
        "models/_base/placeholder.py": "calls its own methods",
        "models/qwen3_vl.py": "calls the method of its base",
    },
}
"""What belongs to the execution path: for each use of a live model, the files that may have it, and why."""


def is_hook(name: str) -> bool:
    """Return whether a function of torch places a hook."""
    return name.startswith("register_") and name.endswith("_hook")


def use_of(name: str, is_called: bool, is_stored: bool) -> str | None:
    """Return the key of `ALLOWED` for a use of an attribute or function; None if it is no use of a live model."""
    if name == "generate":
        return "replaces generate" if is_stored else "calls generate" if is_called else "reads generate"
    if (name == "forward" and is_stored) or name == "replaced_forward":
        return "replaces forward"
    if is_hook(name):
        return "places hooks"
    return "passes features" if name in ("features_to_inputs", "complete_inputs") else None


def uses(source: str) -> Iterator[tuple[str, str]]:
    """Yield each use of a live model in a file, with its source text.

    A name is found whether it is called or only read, as an attribute, as a function, or by `getattr` and `setattr`.
    Calls of the `generate` of a pipeline, or of a function of that name that the file defines, are no such use.
    """
    tree = ast.parse(source)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        use = None
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).split(".")[-1]
            if node.attr != "generate" or owner != "pipeline":
                use = use_of(node.attr, id(node) in called, isinstance(node.ctx, ast.Store))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            is_other = node.id == "generate" and ("generate" in defined or id(node) not in called)
            use = None if is_other else use_of(node.id, True, False)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                use = use_of(name.value, False, node.func.id == "setattr")
        if use is not None:
            yield use, ast.unparse(node)


def problems(file: str, source: str) -> list[str]:
    """Return a sentence about each use of a live model that belongs to the execution path."""
    return [
        f"{file} {use}: {text}; use Pipeline.prepare, Pipeline.generate or tokenprune.pipeline.call_generate"
        for use, text in uses(source)
        if file not in ALLOWED[use]
    ]


@cache
def sources() -> Mapping[str, str]:
    """Return the text of every file of the package by its path; the folders linked into it are read once."""
    files = [
        file
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if not any(path.is_symlink() for path in (file, *file.parents) if ROOT in path.parents)
    ]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


@pytest.mark.parametrize("file", sorted(sources()))
def test_one_entry(file: str) -> None:
    assert problems(file, sources()[file]) == []


def test_the_scan_reads_every_folder() -> None:
    assert {file.split("/")[0] for file in sources()} == set(FOLDERS)
    assert not any(file.startswith(f"tokenprune/{folder}/") for file in sources() for folder in FOLDERS)


@pytest.mark.parametrize("use", ALLOWED)
def test_no_file_is_allowed_more_than_it_does(use: str) -> None:
    assert set(ALLOWED[use]) == {file for file in ALLOWED[use] if use in dict(uses(sources()[file]))}


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("model.generate(**inputs)", "calls generate"),
        ("self.adapter.model.generate(**inputs)", "calls generate"),
        ("generate(model, inputs)", "calls generate"),
        ("answer = model.generate", "reads generate"),
        ("getattr(model, 'generate')(**inputs)", "reads generate"),
        ("model.generate = other", "replaces generate"),
        ("model.forward = other", "replaces forward"),
        ("setattr(model, 'forward', other)", "replaces forward"),
        ("stack.enter_context(replaced_forward(layer, other))", "replaces forward"),
        ("probe.replaced_forward(layer, other)", "replaces forward"),
        ("layer.register_forward_hook(f)", "places hooks"),
        ("layer.register_forward_pre_hook(f, with_kwargs=True)", "places hooks"),
        ("layer.register_full_backward_hook(f)", "places hooks"),
        ("place = layer.register_forward_hook", "places hooks"),
        ("register_module_forward_hook(f)", "places hooks"),
        ("adapter.features_to_inputs(encoding, packed)", "passes features"),
        ("adapter.complete_inputs(encoding)", "passes features"),
    ],
)
def test_the_scan_finds_a_second_entry(source: str, use: str) -> None:
    source = f"def run(model, inputs):\n    with torch.no_grad():\n        {source}\n"
    assert [found for found, _ in uses(source)] == [use]
    for file in ("experiments/other.py", "strategies/other.py", "models/other.py", "tokenprune/other.py"):
        (problem,) = problems(file, source)
        assert problem.startswith(f"{file} {use}: ")


@pytest.mark.parametrize(
    "source",
    [
        '"""Calls model.generate(**inputs)."""',
        "# model.generate(**inputs)",
        "pipeline.generate(inputs)",
        "self.pipeline.generate(inputs, config)",
        "call_generate(model, inputs)",
        "pipeline.generate_prepared(call, prompt)",
        "wrapper.generate_until(requests)",
        "super().forward(x)",
        "def generate():\n    return 1\n\n\ngenerate()",
        "spent = {'generate': 1}",
        "self.register_buffer('x', y)",
    ],
)
def test_the_scan_passes_everything_else(source: str) -> None:
    assert problems("experiments/other.py", source) == []
