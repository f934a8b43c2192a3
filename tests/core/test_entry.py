"""Only the modules of the execution path call `generate`, place hooks, replace methods or pass features to a model."""

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
        "tokenprune/pipeline.py": "calls `generate` of the model",
        "tokenprune/generation.py": "calls the function that the caller passes",
    },
    "reads generate": {
        "tokenprune/pipeline.py": "stores `generate` of the model before a reducer is attached",
        "tokenprune/attach.py": "reads the signature of `generate`, and restores `generate` in copies of the model",
        "experiments/integrations/lmms_eval/model.py": "reports errors that the wrapper of lmms-eval would hide",
    },
    "replaces generate": {
        "tokenprune/attach.py": "installs a `generate` that passes calls to the pipeline",
        "experiments/integrations/lmms_eval/model.py": "reports errors that the wrapper of lmms-eval would hide",
    },
    "replaces forward": {
        "models/_capture/hooks.py": "`replaced_forward`",
        "models/_capture/truncated_tower.py": "skips layers",
        "models/_capture/reduced_layers.py": "runs layers of the tower on the patches that remain",
        "models/_base/compiled_decoder.py": "runs compiled graphs during a call",
        "models/_base/native_resolution.py": "runs patch mergers of the tower on the tokens that remain",
        "models/qwen2_5_vl.py": "runs the compiled tower while the model encodes images",
        "models/mllama.py": "passes kept keys through the vision model during a call",
        "models/phi4_multimodal.py": "passes features to the embedding module during a call",
    },
    "places hooks": {
        "tokenprune/attach.py": "reduces plain calls",
        "tokenprune/pipeline.py": "counts the passes through a tower",
        "tokenprune/decoder/narrow_layers.py": "runs layers of the LLM on the tokens that remain",
        "models/_capture/decoder.py": "records what layers of the LLM compute",
        "models/_capture/hooks.py": "captures signals while the tower runs",
        "models/_capture/truncated_tower.py": "ends the tower after the last required layer",
        "models/_capture/compiled_tower.py": "reads the feature layers of a copy of the tower",
        "models/_capture/layer_call.py": "reads the structure of the output of an attention module",
        "models/_capture/vision_run.py": "captures the inputs of the projector",
        "models/mllama.py": "shortens the cross-attention mask during a call",
        "strategies/components/saliency_model.py": "places hooks on the saliency model",
    },
    "passes features": {
        "tokenprune/pipeline.py": "passes features to the model",
        "tokenprune/adapter.py": "calls methods of the same class",
        "models/ovis2.py": "calls the method of the base class",
        "models/perception_lm.py": "calls the method of the base class",
        "models/_base/placeholder.py": "calls methods of the same class",
        "models/qwen3_vl.py": "calls the method of the base class",
    },
}
"""The execution path: the files that may contain each kind of model access, with the reason."""


def is_hook(name: str) -> bool:
    """Return whether a torch function places a hook."""
    return name.startswith("register_") and name.endswith("_hook")


def classify_access(name: str, is_called: bool, is_stored: bool) -> str | None:
    """Return the key of `ALLOWED` for an attribute or function, or None if it does not access a model."""
    if name == "generate":
        return "replaces generate" if is_stored else "calls generate" if is_called else "reads generate"
    if (name == "forward" and is_stored) or name == "replaced_forward":
        return "replaces forward"
    if is_hook(name):
        return "places hooks"
    return "passes features" if name in ("features_to_inputs", "complete_inputs") else None


def find_accesses(source: str) -> Iterator[tuple[str, str]]:
    """Yield each model access in a file, with its source text.

    The scan covers called and read names: attributes, functions, and names passed to `getattr` and `setattr`.
    It excludes `generate` of a pipeline, and a function `generate` that the file defines.
    """
    tree = ast.parse(source)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        access = None
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).split(".")[-1]
            if node.attr != "generate" or owner != "pipeline":
                access = classify_access(node.attr, id(node) in called, isinstance(node.ctx, ast.Store))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            is_local = node.id == "generate" and ("generate" in defined or id(node) not in called)
            access = None if is_local else classify_access(node.id, True, False)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                access = classify_access(name.value, False, node.func.id == "setattr")
        if access is not None:
            yield access, ast.unparse(node)


def list_violations(file: str, source: str) -> list[str]:
    """Return an error message for each model access that `ALLOWED` does not list for the file."""
    return [
        f"{file} {access}: {text}; use Pipeline.prepare, Pipeline.generate or tokenprune.pipeline.call_generate"
        for access, text in find_accesses(source)
        if file not in ALLOWED[access]
    ]


@cache
def read_sources() -> Mapping[str, str]:
    """Return the text of every Python file of `FOLDERS` by its path. Symbolic links are skipped."""
    files = [
        file
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if not any(path.is_symlink() for path in (file, *file.parents) if ROOT in path.parents)
    ]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


@pytest.mark.parametrize("file", sorted(read_sources()))
def test_file_has_only_allowed_accesses(file: str) -> None:
    assert list_violations(file, read_sources()[file]) == []


def test_the_scan_reads_every_folder() -> None:
    assert {file.split("/")[0] for file in read_sources()} == set(FOLDERS)
    assert not any(file.startswith(f"tokenprune/{folder}/") for file in read_sources() for folder in FOLDERS)


@pytest.mark.parametrize("access", ALLOWED)
def test_every_allowed_access_is_present(access: str) -> None:
    assert set(ALLOWED[access]) == {
        file for file in ALLOWED[access] if access in dict(find_accesses(read_sources()[file]))
    }


@pytest.mark.parametrize(
    ("source", "access"),
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
def test_the_scan_finds_every_kind_of_access(source: str, access: str) -> None:
    source = f"def run(model, inputs):\n    with torch.no_grad():\n        {source}\n"
    assert [kind for kind, _ in find_accesses(source)] == [access]
    for file in ("experiments/other.py", "strategies/other.py", "models/other.py", "tokenprune/other.py"):
        (violation,) = list_violations(file, source)
        assert violation.startswith(f"{file} {access}: ")


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
def test_the_scan_accepts_all_remaining_code(source: str) -> None:
    assert list_violations("experiments/other.py", source) == []
