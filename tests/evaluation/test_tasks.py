"""Tasks: boards, folders of the user, and sampling."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.small_grid import records, write_config
from tokenprune.cli.main import main
from tokenprune.experiments.evaluation.experiment import Experiment, Setting, run_settings
from tokenprune.experiments.evaluation.tasks import Boards, Folder, Pages, tasks
from tokenprune.strategies import Random

pytestmark = pytest.mark.usefixtures("in_empty_folder")


def test_boards_are_the_held_out_boards_in_order() -> None:
    samples = list(Boards(number=2).samples())
    assert [sample.id for sample in samples] == [sample.id for sample in Boards(number=2).samples()]
    assert {sample.group for sample in samples} == {"boards/1000", "boards/1001"}
    assert {sample.split for sample in samples} <= {"tiles", "base", "either"}
    assert set(tasks()) == {"Boards", "Folder", "LmmsTask", "Pages"}


def test_pages_are_split_by_the_tiles_of_their_evidence() -> None:
    samples = list(Pages(number=4).samples())
    assert {sample.group for sample in samples} == {f"pages/{index}" for index in range(1000, 1004)}
    assert {sample.split for sample in samples} == {"one tile", "several tiles", "base"}
    for sample in samples:
        assert (sample.split == "base") == (sample.evidence_tiles == "base")
        if sample.type in ("value", "name", "color_value", "largest", "smallest"):
            assert sample.split == "one tile"


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_a_task_of_lmms_eval_without_lmms_eval_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    task = {"class_path": "lmms-task", "init_args": {"name": "textvqa_val"}}
    config = write_config({"task": task, "grid": {"reducer.budget": [0.2]}})
    assert main(["ablate", config, "--dry-run"]) == 0
    assert "9 settings" in capsys.readouterr().out
    assert main(["ablate", config]) == 2
    assert 'LmmsTask needs lmms-eval, which is not installed here: pip install -e ".[lmms]"' in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["jsonl", "imagefolder", "csv"])
def test_a_folder_of_the_user(layout: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    if layout == "csv":
        (tmp_path / "metadata.csv").write_text("file_name,question,answer\na.png,What color?,red\n")
    elif layout == "imagefolder":
        row = {"file_name": "a.png", "question": "What color?", "answer": ["red", "crimson"]}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    else:
        (tmp_path / "data.jsonl").write_text(json.dumps({"image": "a.png", "question": "What color?", "answer": "red"}))
    task = Folder(str(tmp_path if layout != "jsonl" else tmp_path / "data.jsonl"))
    (sample,) = task.samples()
    assert sample.image().size == (40, 30)
    assert task.score(sample, " Red. ") == 1.0
    assert task.score(sample, "blue") == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no line"),
        ("{oops", "line 1 is no JSON"),
        ('{"image": "a.png", "answer": "b"}', "line 1: there is no question"),
        ('{"question": "a", "answer": "b"}', "line 1: there is no image"),
        ("[1]", "line 1: expected an object"),
        ('{"id": 1, "image": "a", "question": "q", "answer": "b"}\n' * 2, "two samples have the id '1'"),
    ],
)
def test_an_invalid_metadata_file_is_reported(text: str, message: str) -> None:
    Path("data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(Folder("data.jsonl").samples())


def save_image(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), color).save(path)


def test_metadata_in_subfolders(tmp_path: Path) -> None:
    for folder in ("train", "test"):
        save_image(tmp_path / folder / "deep" / "a.png", "red" if folder == "train" else "blue")
        (tmp_path / folder / "metadata.csv").write_text(
            "\ufefffile_name,question,answer\ndeep/a.png,What color?,red\n", encoding="utf-8"
        )
    test_sample, train_sample = Folder(str(tmp_path)).samples()
    assert (test_sample.id, train_sample.id) == ("test/metadata/2", "train/metadata/2")
    assert (test_sample.group, train_sample.group) == ("test/deep/a.png", "train/deep/a.png")
    assert test_sample.image().getpixel((0, 0)) == (0, 0, 255)
    assert train_sample.image().getpixel((0, 0)) == (255, 0, 0)


def test_folders_named_by_their_label(tmp_path: Path) -> None:
    for color in ("red", "blue"):
        save_image(tmp_path / color / "a.png", color)
    with pytest.raises(ValueError, match=r"--task.question"):
        list(Folder(str(tmp_path)).samples())
    samples = list(Folder(str(tmp_path), question="What color?").samples())
    assert [(sample.id, sample.answers) for sample in samples] == [("blue/a.png", ("blue",)), ("red/a.png", ("red",))]
    assert samples[0].image().getpixel((0, 0)) == (0, 0, 255)


def test_a_zero_answer_and_a_line_separator_are_valid() -> None:
    rows = [
        {"id": 0, "image": "a.png", "question": "How many?", "answer": 0},
        {"image": "a.png", "question": "one\u2028two", "answer": "b"},
    ]
    Path("data.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    zero_answer, line_separator = Folder("data.jsonl").samples()
    assert (zero_answer.id, zero_answer.answers) == ("0", ("0",))
    assert line_separator.question == "one\u2028two"


def test_a_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metadata.jsonl"):
        list(Folder(str(tmp_path)).samples())
    with pytest.raises(ValueError, match="no such file or folder"):
        list(Folder("nowhere").samples())
    with pytest.raises(ValueError, match="score_by='accuracy' is no metric"):
        Folder("x", score_by="accuracy")


def test_sampling_depends_on_the_seed() -> None:
    experiment = Experiment(
        reducer=Random(0.1), task=Boards(number=1), max_new_tokens=4, batch_size=32, temperature=5.0
    )
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_settings([Setting(replace(experiment, seed=seed), "x")], Path(name))
    texts = [[row["prediction"] for rows in records(name).values() for row in rows] for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert torch.is_grad_enabled()
