"""The identity of records: a changed model, data set, code or version is detected, and records are never mixed."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenprune.cli.main import main
from tokenprune.experiments.evaluation import identity
from tokenprune.experiments.evaluation.experiment import Experiment, Setting, run_settings
from tokenprune.experiments.evaluation.identity import IdentityError
from tokenprune.experiments.evaluation.loading import is_hub_snapshot
from tokenprune.experiments.evaluation.records import RECORD_FIELDS, delete_records, read_lines
from tokenprune.experiments.evaluation.tasks import Boards, Folder, LmmsTask
from tokenprune.experiments.tracking import publish
from tokenprune.models import mini
from tokenprune.strategies import HiRED


def write_data(folder: Path, questions: list[tuple[str, str]], shade: int = 0) -> Path:
    """Write a data set of questions about one image."""
    pixels = np.array(Image.open(mini.image_path()).convert("RGB"))
    Image.fromarray(np.clip(pixels.astype(int) + shade, 0, 255).astype(np.uint8)).save(folder / "b.png")
    lines = [json.dumps({"image": "b.png", "question": question, "answer": answer}) for question, answer in questions]
    (folder / "d.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "d.jsonl"


QUESTIONS = [("How many shapes are there?", "4"), ("Where is it?", "top")]


def run(data: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    setting = Setting(Experiment(reducer=HiRED(0.2), task=Folder(str(data)), max_new_tokens=2, **options), "HiRED")
    run_settings([setting], out)
    return list(read_lines(setting.folder(out) / "records.jsonl"))


def test_an_unchanged_run_is_resumed(tmp_path: Path) -> None:
    data = write_data(tmp_path, QUESTIONS)
    first = run(data, tmp_path / "out")
    assert run(data, tmp_path / "out") == first
    assert len({record["sample_digest"] for record in first}) == 2
    assert [list(record) for record in first] == [list(RECORD_FIELDS)] * len(first)


def test_new_samples_at_the_end_are_run(tmp_path: Path) -> None:
    run(write_data(tmp_path, QUESTIONS), tmp_path / "out")
    records = run(write_data(tmp_path, [*QUESTIONS, ("What number is on it?", "7")]), tmp_path / "out")
    assert [record["question"] for record in records] == [
        "How many shapes are there?",
        "Where is it?",
        "What number is on it?",
    ]


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "question": (
        lambda p: write_data(p, [("How many stars are there?", "4"), QUESTIONS[1]]),
        r"1 sample changed: .*question",
    ),
    "answer": (lambda p: write_data(p, [QUESTIONS[0], ("Where is it?", "left")]), r"1 sample changed: .*answer"),
    "image": (lambda p: write_data(p, QUESTIONS, shade=9), r"2 samples changed: .*image"),
    "order": (lambda p: write_data(p, [("What number is on it?", "7"), *QUESTIONS]), r"2 samples changed"),
    "missing": (lambda p: write_data(p, QUESTIONS[:1]), r"1 sample left the data set: .*Where is it"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_is_detected(tmp_path: Path, name: str) -> None:
    change, sentence = CHANGES[name]
    data = write_data(tmp_path, QUESTIONS)
    before = run(data, tmp_path / "out")
    change(tmp_path)
    with pytest.raises(IdentityError, match=sentence) as caught:
        run(data, tmp_path / "out")
    assert "--fresh" in str(caught.value)
    assert "another --out" in str(caught.value)
    records = next((tmp_path / "out").rglob("records.jsonl"))
    assert list(read_lines(records)) == before


def test_changed_weights_are_detected(tmp_path: Path) -> None:
    """Weights count as changed if their content differs, even if the file size is equal."""
    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype="float32")
    folder = tmp_path / "checkpoint"

    def save() -> None:
        model.save_pretrained(folder)
        AutoProcessor.from_pretrained(mini.path()).save_pretrained(folder)

    save()
    data = write_data(tmp_path, QUESTIONS)
    run(data, tmp_path / "out", model=str(folder))
    save()
    run(data, tmp_path / "out", model=str(folder))
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    save()
    with pytest.raises(IdentityError, match=r"the weights or configuration of .*model.safetensors changed"):
        run(data, tmp_path / "out", model=str(folder))


def test_changed_versions_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path, QUESTIONS)
    run(data, tmp_path / "out")
    versions = identity.library_versions()
    monkeypatch.setattr(identity, "library_versions", lambda packages: {**versions, "transformers": "99.0"})
    with pytest.raises(IdentityError, match=rf"transformers {versions['transformers']} -> 99.0"):
        run(data, tmp_path / "out")


def test_changed_code_of_a_strategy_is_detected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, data = tmp_path / "loud.py", write_data(tmp_path, QUESTIONS)
    source = """
from dataclasses import dataclass
from tokenprune import ScoreReducer


@dataclass
class Loud(ScoreReducer):
    '''Keep large tokens.'''

    def score(self, image):
        return image.features.float().norm(dim=-1)
"""
    words = ["evaluate", "--reducer", f"{file}:Loud", "--task", "folder", "--task.path", str(data), "--quiet", "true"]
    words += ["--out", str(tmp_path / "out"), "--max-new-tokens", "2"]
    file.write_text(source)
    assert main(words) == 0
    file.write_text(source.replace("return ", "return -"))
    assert main(words) != 0
    assert "the code in loud.py changed" in capsys.readouterr().err
    assert main([*words, "--fresh"]) == 0


def test_records_without_an_identity_are_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path, QUESTIONS)
    run(data, tmp_path / "out")
    next((tmp_path / "out").rglob("identity.json")).unlink()
    with pytest.raises(IdentityError, match="they have no identity"):
        run(data, tmp_path / "out")
    delete_records(next((tmp_path / "out").rglob("records.jsonl")).parent)
    assert len(run(data, tmp_path / "out")) == 2


def test_a_grid_reports_each_change_once(tmp_path: Path) -> None:
    base = Experiment(task=Boards(1), max_new_tokens=2)
    settings = [Setting(replace(base, reducer=HiRED(budget)), str(budget)) for budget in (0.1, 0.2)]
    run_settings(settings, tmp_path)
    for file in tmp_path.rglob("identity.json"):
        content = json.loads(file.read_text())
        content["versions"]["torch"] = "1.0"
        file.write_text(json.dumps(content))
    with pytest.raises(
        IdentityError, match=r"records of 2 of 2 settings that do not belong to this run: torch 1.0 -> "
    ) as caught:
        run_settings(settings, tmp_path)
    assert str(caught.value).count("torch 1.0") == 1


def test_fresh_discards_the_records_of_an_ablation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path, QUESTIONS)
    grid = tmp_path / "grid.yaml"
    task = f"{{class_path: Folder, init_args: {{path: {data}}}}}"
    grid.write_text(f"task: {task}\nmax_new_tokens: 2\ngrid:\n  reducer.budget: [0.1, 0.2]\nbaselines: []\n")
    words = ["ablate", str(grid), "--out", str(tmp_path / "out"), "--quiet", "true"]
    if main([*words, "--dry-run"]) != 0:
        pytest.fail(capsys.readouterr().err)
    assert main(words) == 0
    write_data(tmp_path, QUESTIONS, shade=9)
    assert main(words) != 0
    assert "2 samples changed" in capsys.readouterr().err
    assert main([*words, "--fresh"]) == 0


@pytest.mark.slow  # starts several processes
def test_fresh_and_a_refusal_with_workers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command fails before a worker starts, and the records do not change."""
    data, grid = write_data(tmp_path, QUESTIONS), tmp_path / "grid.yaml"
    task = f"{{class_path: Folder, init_args: {{path: {data}}}}}"
    grid.write_text(f"task: {task}\nmax_new_tokens: 2\ngrid:\n  reducer.budget: [0.1, 0.2]\nbaselines: []\n")
    words = ["ablate", str(grid), "--out", str(tmp_path / "out"), "--workers", "2", "--quiet", "true"]
    assert main([word for word in words if word not in ("--workers", "2")]) == 0
    assert main(words) == 0
    files = sorted((tmp_path / "out").rglob("records.jsonl"))
    before = [file.read_bytes() for file in files]
    write_data(tmp_path, [QUESTIONS[0], ("Where is it?", "left")])
    capfd.readouterr()
    assert main(words) == 2
    message = capfd.readouterr().err
    assert message.count("1 sample changed: d/2 (answers)") == 1
    assert "worker" not in message
    assert [file.read_bytes() for file in files] == before
    assert main([*words, "--fresh"]) == 0
    for file in files:
        assert sorted((record["question"], record["answer"]) for record in read_lines(file)) == [
            ("How many shapes are there?", "4"),
            ("Where is it?", "left"),
        ]


def test_all_settings_are_checked_before_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first task has a sample without a record, and the second task has stale records."""
    grid, folders = tmp_path / "grid.yaml", [tmp_path / "a", tmp_path / "b"]
    tasks = []
    for folder in folders:
        folder.mkdir()
        tasks.append({"class_path": "Folder", "init_args": {"path": str(write_data(folder, QUESTIONS))}})
    grid.write_text(
        json.dumps({"max_new_tokens": 2, "grid": {"task": tasks, "reducer.budget": [0.1]}, "baselines": False})
    )
    words = ["ablate", str(grid), "--out", str(tmp_path / "out"), "--quiet", "true"]
    assert main(words) == 0
    files = sorted((tmp_path / "out").rglob("records.jsonl"))
    before = [file.read_bytes() for file in files]
    write_data(folders[0], [*QUESTIONS, ("What number is on it?", "7")])
    write_data(folders[1], QUESTIONS, shade=9)
    assert main(words) == 2
    assert "2 samples changed: d/1 (image), d/2 (image)" in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == before


def test_a_refused_run_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path, QUESTIONS)
    words = ["evaluate", "--task", "folder", "--task.path", str(data), "--quiet", "true", "--max-new-tokens", "2"]
    words += ["--out", str(tmp_path / "out")]
    assert main(words) == 0
    write_data(tmp_path, QUESTIONS, shade=9)
    monkeypatch.setattr(publish, "track_run", lambda *_, **__: pytest.fail("stale records were published"))
    assert main([*words, "--wandb", "project"]) == 2


def test_a_sweep_ends_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, sweep = write_data(tmp_path, QUESTIONS), tmp_path / "sweep.yaml"
    parameters = {"reducer.budget": {"values": [0.1]}, "max-new-tokens": {"value": 2}, "task": {"value": "folder"}}
    parameters |= {"task.path": {"value": str(data)}, "out": {"value": str(tmp_path / "out")}}
    command = ["${env}", "tokenprune", "evaluate", "${args}"]
    sweep.write_text(json.dumps({"method": "grid", "parameters": parameters, "command": command}))
    assert main(["sweep", str(sweep), "--local"]) == 0
    write_data(tmp_path, [QUESTIONS[0], ("Where is he?", "top")])
    capsys.readouterr()
    assert main(["sweep", str(sweep), "--local"]) == 2
    assert "1 sample changed: d/2 (question)" in capsys.readouterr().err


def test_a_stored_image_is_replaced_when_records_are_discarded(tmp_path: Path) -> None:
    data = write_data(tmp_path, QUESTIONS)
    run(data, tmp_path / "out")
    (file,) = (tmp_path / "out" / "images").iterdir()
    before = file.read_bytes()
    write_data(tmp_path, QUESTIONS, shade=60)
    delete_records(next((tmp_path / "out").rglob("records.jsonl")).parent)
    records = run(data, tmp_path / "out")
    (file,) = (tmp_path / "out" / "images").iterdir()
    assert file.read_bytes() != before
    assert {record["stored_image"] for record in records} == {f"images/{file.name}"}


@pytest.mark.parametrize(("name", "is_snapshot"), [("a" * 40, True), ("step-1000", False)])
def test_a_checkpoint_folder_is_no_hub_snapshot(tmp_path: Path, name: str, is_snapshot: bool) -> None:
    assert is_hub_snapshot(tmp_path / "snapshots" / name) is is_snapshot


def test_fresh_keeps_the_records_if_the_run_cannot_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If the model or the data is missing, `--fresh` does not discard records."""
    model, folder = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype="float32"), tmp_path / "checkpoint"
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(mini.path()).save_pretrained(folder)
    data, grid = write_data(tmp_path, QUESTIONS), tmp_path / "grid.yaml"
    arguments = ["evaluate", "--task", "folder", "--task.path", str(data), "--model", str(folder), "--quiet", "true"]
    arguments += ["--max-new-tokens", "2", "--out", str(tmp_path / "out")]
    task = {"class_path": "Folder", "init_args": {"path": str(data)}}
    content = {"model": str(folder), "task": task, "max_new_tokens": 2, "grid": {"reducer.budget": [0.1]}}
    grid.write_text(json.dumps({**content, "baselines": False}))
    commands = [arguments, ["ablate", str(grid), "--out", str(tmp_path / "grid"), "--quiet", "true"]]
    assert [main(command) for command in commands] == [0, 0]
    files = sorted(tmp_path.rglob("records.jsonl"))
    before = [file.read_bytes() for file in files]
    assert len(files) == 2
    for path in (data, folder):
        path.rename(tmp_path / "away")
        for command in commands:
            capsys.readouterr()
            assert main([*command, "--fresh"]) == 2
            assert "no such f" in capsys.readouterr().err
            assert [file.read_bytes() for file in files] == before
        (tmp_path / "away").rename(path)
    assert [main([*command, "--fresh"]) for command in commands] == [0, 0]


def test_a_changed_base_model_of_an_adapter_is_detected(tmp_path: Path) -> None:
    """A change of the base model is detected although the folder of a peft adapter does not store its weights."""
    peft = pytest.importorskip("peft")
    model, base, adapter = (
        AutoModelForImageTextToText.from_pretrained(mini.path(), dtype="float32"),
        tmp_path / "base",
        tmp_path / "adapter",
    )
    processor = AutoProcessor.from_pretrained(mini.path())
    model.save_pretrained(base)
    loaded = AutoModelForImageTextToText.from_pretrained(base, dtype="float32")
    peft.get_peft_model(loaded, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    for folder in (base, adapter):
        processor.save_pretrained(folder)
    data = write_data(tmp_path, QUESTIONS)
    first = run(data, tmp_path / "out", model=str(adapter))
    assert run(data, tmp_path / "out", model=str(adapter)) == first
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    model.save_pretrained(base)
    with pytest.raises(IdentityError, match=r"of base model .*base: model.safetensors changed"):
        run(data, tmp_path / "out", model=str(adapter))


def test_processes_that_share_the_samples_compare_identities(tmp_path: Path) -> None:
    """The second process continues the records of the first process, or raises an error if the data changed."""
    data, out = write_data(tmp_path, QUESTIONS), tmp_path / "out"
    (tmp_path / "c.png").write_bytes((tmp_path / "b.png").read_bytes())
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], lines[1].replace("b.png", "c.png")]) + "\n")
    setting = Setting(Experiment(reducer=HiRED(0.2), task=Folder(str(data)), max_new_tokens=2), "HiRED")
    run_settings([setting], out, rank=0, world=2)
    original = data.read_text()
    data.write_text(original.replace("How many", "So many"))
    with pytest.raises(IdentityError, match=r"1 sample changed: d/1 \(question\)"):
        run_settings([setting], out, rank=1, world=2)
    data.write_text(original)
    run_settings([setting], out, rank=1, world=2)
    records = list(read_lines(setting.folder(out) / "records.jsonl"))
    assert [record["question"] for record in records] == [question for question, _ in QUESTIONS]
    run_settings([setting], out, rank=0, world=2)
    assert list(read_lines(setting.folder(out) / "records.jsonl")) == records


@pytest.mark.parametrize("content", ["{torn", "[]", '{"layout": 2}', '{"layout": 1}'])
def test_a_damaged_identity_is_refused_like_a_missing_identity(tmp_path: Path, content: str) -> None:
    data = write_data(tmp_path, QUESTIONS)
    run(data, tmp_path / "out")
    next((tmp_path / "out").rglob("identity.json")).write_text(content)
    with pytest.raises(IdentityError, match=r"they have no identity .* --fresh"):
        run(data, tmp_path / "out")


def test_versions_include_image_and_tokenizer_libraries() -> None:
    names = identity.compute_identity(Experiment()).versions
    assert {"torch", "transformers", "tokenizers", "torchvision", "pillow"} <= set(names)
    assert "lmms_eval" in LmmsTask.packages


def test_code_includes_files_of_custom_lmms_tasks(tmp_path: Path) -> None:
    for name in ("mine.yaml", "_default_template_yaml", "utils.py", "notes.txt"):
        (tmp_path / name).write_text("a")
    experiment = Experiment(task=LmmsTask("mine", include_path=str(tmp_path)))
    before = identity.code_hashes(experiment)
    assert set(before) == {"mine.yaml", "_default_template_yaml", "utils.py"}
    (tmp_path / "utils.py").write_text("b")
    assert identity.code_hashes(experiment)["utils.py"] != before["utils.py"]


def test_code_includes_an_installed_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package installed below the folder of the standard library still counts as code of the user."""
    packages = tmp_path / "lib" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "quiet_strategies.py").write_text(
        "from dataclasses import dataclass\nfrom tokenprune.strategies import HiRED\n\n\n"
        "@dataclass\nclass Quiet(HiRED):\n    '''Keep what HiRED keeps.'''\n"
    )
    monkeypatch.syspath_prepend(str(packages))
    module = importlib.import_module("quiet_strategies")
    # Without a virtual environment, installed packages are below the folder of the standard library.
    monkeypatch.setattr(inspect, "__file__", str(tmp_path / "lib" / "inspect.py"))
    assert set(identity.code_hashes(Experiment(reducer=module.Quiet(0.2)))) == {"quiet_strategies.py"}
