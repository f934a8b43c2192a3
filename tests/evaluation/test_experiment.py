"""Experiments and ablations: resuming from records, one encoding per image, and validation of grids before a run."""

from __future__ import annotations

import importlib.util
import itertools
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tests.helpers.small_grid import SMALL, records, remove_times, start
from tokenprune.cli.main import main
from tokenprune.experiments.evaluation import experiment as running
from tokenprune.experiments.evaluation.experiment import Experiment, Setting, run_settings
from tokenprune.experiments.evaluation.grid import expand, format_value, group_by_model, parse_experiment, select_shard
from tokenprune.experiments.evaluation.records import (
    InUseError,
    RecordFile,
    list_recorded_samples,
    merge,
    merge_if_complete,
    read_lines,
)
from tokenprune.experiments.evaluation.tasks import Boards, Folder, Sample, tasks
from tokenprune.models import mini
from tokenprune.strategies import SCOPE, HiRED, ImageDownsample, Random, UniformStride
from tokenprune.strategies.components import RandomSelection

CONFIGS = Path(__file__).parents[2] / "experiments/configs"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_config(config: dict[str, Any], name: str = "small.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(config))
    return name


def run_refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_truncated_record_is_dropped_and_written_again(tmp_path: Path) -> None:
    with RecordFile(tmp_path) as file:
        file.add({"sample": "a", "score": 1.0})
        file.add({"sample": "b", "score": 0.0})
    content = (tmp_path / "records.jsonl").read_text()
    (tmp_path / "records.jsonl").write_text(content + '{"sample": "c", "sco')
    assert list_recorded_samples(tmp_path) == {"a", "b"}
    with RecordFile(tmp_path) as file:
        file.add({"sample": "c", "score": 1.0})
        with pytest.raises(ValueError, match="'c' has a record already"):
            file.add({"sample": "c", "score": 1.0})
    assert [row["sample"] for row in read_lines(tmp_path / "records.jsonl")] == ["a", "b", "c"]
    (tmp_path / "records.jsonl").write_text("{broken\n" + content)
    with pytest.raises(ValueError, match=r"records.jsonl, line 1 is no record"):
        list_recorded_samples(tmp_path)


def test_two_processes_cannot_write_the_same_records(tmp_path: Path) -> None:
    with RecordFile(tmp_path), pytest.raises(InUseError, match="another process writes to"):
        RecordFile(tmp_path)
    with RecordFile(tmp_path, 0), RecordFile(tmp_path, 1):  # separate part files
        for rank in (None, 1):
            with pytest.raises(InUseError):
                RecordFile(tmp_path, rank)
    with RecordFile(tmp_path), pytest.raises(InUseError):
        RecordFile(tmp_path, 0)


def test_parts_are_not_merged_while_a_process_writes_or_samples_are_missing(tmp_path: Path) -> None:
    with RecordFile(tmp_path, 0) as first_part:
        first_part.add({"sample": "a"})
        merge_if_complete(tmp_path, ["a"])
    merge_if_complete(tmp_path, ["a", "b"])
    assert (tmp_path / "records.part-0.jsonl").is_file()
    with RecordFile(tmp_path, 1) as second_part:
        second_part.add({"sample": "b"})
    merge_if_complete(tmp_path, ["a", "b"])
    assert [row["sample"] for row in read_lines(tmp_path / "records.jsonl")] == ["a", "b"]
    assert not list(tmp_path.glob("records.part*"))


def test_parts_are_merged_in_sample_order(tmp_path: Path) -> None:
    for rank, names in enumerate((["c", "a"], ["b"])):
        with RecordFile(tmp_path, rank) as file:
            for name in names:
                file.add({"sample": name})
    assert list_recorded_samples(tmp_path) == {"a", "b", "c"}
    merge(tmp_path, ["a", "b", "c"])
    assert [row["sample"] for row in read_lines(tmp_path / "records.jsonl")] == ["a", "b", "c"]
    assert not list(tmp_path.glob("records.part*"))


# --- experiments ------------------------------------------------------------------------------------------------------


def test_the_hash_depends_on_the_values_and_not_on_their_notation() -> None:
    experiment = parse_experiment(["--reducer", "HiRED", "--reducer.budget", "0.1", "--task", "boards"])
    same_experiment = parse_experiment(["--task.number", "40", "--reducer.newlines=keep_rows", "--reducer.budget=0.1"])
    assert experiment.hash() == same_experiment.hash() == replace(experiment, device="cuda").hash()
    assert experiment.hash() != replace(experiment, seed=1).hash()
    text = yaml.safe_dump(experiment.config(), sort_keys=True)
    Path("again.yaml").write_text(text)
    assert parse_experiment(["--config", "again.yaml"]) == experiment


def test_sharing_an_encoding_does_not_change_records() -> None:
    """Records are the same if strategies with different signals share an encoding and if each runs separately."""
    task = Boards(number=2)
    settings = [
        Setting(Experiment(reducer=reducer, task=task, max_new_tokens=4, batch_size=32), type(reducer).__name__)
        for reducer in (HiRED(0.1), SCOPE(0.1), ImageDownsample(0.2), UniformStride(1.0))
    ]
    progress = run_settings(settings, Path("together"))
    assert (progress.images, progress.encodes, progress.more_encodes) == (2, 2, 2)
    for setting in settings:
        run_settings([setting], Path("alone"))
    assert remove_times(records("together")) == remove_times(records("alone"))
    assert progress.done == progress.total == sum(map(len, records("together").values()))


def test_existing_records_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(Experiment(reducer=HiRED(0.1), task=Boards(number=2), max_new_tokens=4, batch_size=4), "HiRED")
    run_settings([setting], Path("out"))
    complete_records = remove_times(records("out"))
    file = setting.folder(Path("out")) / "records.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]))  # in the middle of a batch
    progress = run_settings([setting], Path("out"))
    assert progress.total == len(lines)
    assert remove_times(records("out")) == complete_records
    monkeypatch.setattr(running, "load", lambda *args: pytest.fail("a complete run loaded the model"))
    assert run_settings([setting], Path("out")).images == 0


def test_a_setting_folder_describes_its_experiment() -> None:
    setting = Setting(
        Experiment(reducer=HiRED(0.1), task=Boards(number=1), max_new_tokens=4, batch_size=32), "HiRED, 10 %"
    )
    run_settings([setting], Path("out"))
    folder = setting.folder(Path("out"))
    assert parse_experiment(["--config", str(folder / "config.yaml")]) == setting.experiment
    metadata = json.loads((folder / "setting.json").read_text())
    assert (metadata["name"], metadata["strategy"], metadata["budget"], metadata["metric"]) == (
        "HiRED, 10 %",
        "HiRED",
        0.1,
        "exact_match",
    )
    environment = json.loads((folder / "environment.json").read_text())
    assert {"torch", "transformers", "tokenprune", "device", "commit", "started"} <= set(environment)
    (rows,) = records("out").values()
    assert all(row["kept"] == row["asked"] == sum(row["kept_per_tile"]) for row in rows)
    assert all(row["prompt_length"] < row["prompt_length_full"] and row["generate_ms"] > 0 for row in rows)
    assert sum(row["correct"] for row in rows) / len(rows) > 0.7


def test_an_unreadable_image_gives_an_error_record_and_the_run_continues(capsys: pytest.CaptureFixture[str]) -> None:
    Image.open(mini.image_path()).save("good.png")
    Path("bad.png").write_text("no image")
    sample = {"question": "How many shapes are there?", "answer": "4"}
    rows = [{"image": name, **sample} for name in ("bad.png", "good.png")]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        "evaluate",
        "--task",
        "folder",
        "--task.path",
        "data.jsonl",
        "--max-new-tokens",
        "4",
        "--out",
        "out",
        "--quiet",
    ]
    for _ in range(2):  # the second run has no new samples and reports the error again
        assert main(command) == 1
        assert "1 samples failed" in capsys.readouterr().err
    (recorded,) = records("out").values()
    assert [row["error"] is None for row in recorded] == [False, True]
    assert "not an image" in recorded[0]["error"]
    assert recorded[1]["prediction"] == "4"
    Image.open("good.png").save("bad.png")
    assert main([*command, "--retry-errors"]) == 0
    (recorded,) = records("out").values()
    assert sorted((row["image"], row["prediction"]) for row in recorded) == [("bad.png", "4"), ("good.png", "4")]


def test_duplicate_sample_ids_are_refused_before_a_run() -> None:
    class Twice(Boards):
        def samples(self) -> Iterator[Sample]:
            yield from itertools.chain(super().samples(), super().samples())

    with pytest.raises(ValueError, match="Twice: several samples have the id 'boards/1000/0'"):
        run_settings([Setting(Experiment(task=Twice(1)), "x")], Path("out"))


def test_a_missing_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert running._read_commit() is None


def test_an_unsupported_strategy_is_reported_before_a_run() -> None:
    from tokenprune.strategies import CDPruner

    reducers = {"a": HiRED(), "b": CDPruner()}
    settings = [Setting(Experiment(reducer=reducer, task=Boards(1)), name) for name, reducer in reducers.items()]
    with pytest.raises(ValueError, match=r"b: reads the question; set reducer.text_model"):
        run_settings(settings, Path("out"))
    assert not any(records("out").values())


def test_a_full_disk_loses_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(Experiment(reducer=HiRED(0.1), task=Boards(number=1), max_new_tokens=4, batch_size=32), "HiRED")
    add_record, calls = RecordFile.add, []

    def fail_at_fourth_record(self: RecordFile, record: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            self._out.write('{"sample": "half')
            self._out.flush()
            raise OSError(28, "No space left on device")
        add_record(self, record)

    monkeypatch.setattr(RecordFile, "add", fail_at_fourth_record)
    with pytest.raises(OSError, match="No space left"):
        run_settings([setting], Path("out"))
    assert len(list_recorded_samples(setting.folder(Path("out")))) == 3
    monkeypatch.setattr(RecordFile, "add", add_record)
    progress = run_settings([setting], Path("out"))
    (rows,) = records("out").values()
    assert len(rows) == progress.total == len({row["sample"] for row in rows})


# --- ablations --------------------------------------------------------------------------------------------------------


def test_a_grid_includes_full_tokens_and_baselines() -> None:
    settings = expand(SMALL)
    assert Counter(setting.role for setting in settings) == {"grid": 4, "full": 1, "baseline": 2 * 7}
    assert len({setting.experiment.hash() for setting in settings}) == len(settings)
    assert settings[1].name == "HiRED, budget=0.05, selection=TopAttentionSelection(layer=first)"
    assert settings[1].factors == {"reducer.budget": "0.05", "reducer.selection": "TopAttentionSelection(layer=first)"}
    random_reducers = [setting.experiment.reducer for setting in settings if "Random" in setting.name]
    assert [reducer.selection for reducer in random_reducers[:3]] == [RandomSelection(seed) for seed in range(3)]  # type: ignore[attr-defined]
    assert len(expand({**SMALL, "baselines": False})) == 4
    assert len(expand({**SMALL, "random_seeds": 1})) == 19 - 4


def test_a_grid_can_vary_strategies_and_presets() -> None:
    config = {**SMALL, "grid": {"reducer": ["HiRED.release", "scope"], "reducer.budget": [0.1]}, "baselines": False}
    preset, strategy = expand(config)
    assert preset.experiment.reducer == HiRED.release(0.1)
    assert strategy.experiment.reducer == SCOPE(0.1)
    assert (preset.name, strategy.name) == ("reducer=HiRED.release, budget=0.1", "reducer=scope, budget=0.1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grid": {"reducer.selection": ["TopAttenton"]}},
            "selection=TopAttenton: .*Did you mean TopAttentionSelection",
        ),
        ({"grid": {"reducer.budgt": [0.1]}}, "budgt=0.1: .*budgt.*did you mean budget"),
        (
            {"grid": {"reducer.budget": [0.1, 1.5, -2]}},
            "(?s)2 settings of the grid are not valid.*budget=1.5.*budget=-2",
        ),
        ({"grid": {"reducer.budget": 0.1}}, "grid.reducer.budget: give a list of values"),
        ({"task": "bords"}, "no task is called 'bords'. Did you mean Boards"),
        ({"modell": "mini"}, "no key 'modell' in an ablation .did you mean model"),
        ({"reducer": "HiRD"}, "no strategy is called 'HiRD'. Did you mean HiRED"),
    ],
)
def test_an_invalid_grid_is_refused_before_a_run(
    change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        expand({**SMALL, **change})
    assert main(["ablate", write_config({**SMALL, **change}), "--out", "out"]) == 2
    assert not Path("out").exists()


def test_a_directory_of_another_ablation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        **SMALL,
        "grid": {"reducer.budget": [0.1]},
        "baselines": False,
        "task": {"class_path": "boards", "init_args": {"number": 1}},
    }
    assert main(["ablate", write_config(config), "--out", "out", "--quiet"]) == 0
    before = records("out")
    assert main(["ablate", write_config(config), "--out", "out"]) == 0
    assert "0 (all records exist)" in capsys.readouterr().err
    assert records("out") == before
    assert main(["ablate", write_config({**config, "seed": 0, "dtype": "auto"}), "--out", "out", "--quiet"]) == 0
    assert "holds another ablation" in run_refused(
        capsys, "ablate", write_config({**config, "seed": 3}), "--out", "out"
    )
    assert "no such file" in run_refused(capsys, "ablate", "nowhere.yaml")


def test_shards_are_parts_of_the_grid() -> None:
    settings = expand(SMALL)
    parts = [select_shard(settings, f"{number}/3") for number in range(3)]
    hashes = sorted(setting.experiment.hash() for part in parts for setting in part)
    assert hashes == sorted(setting.experiment.hash() for setting in settings)
    with pytest.raises(ValueError, match="write i/n"):
        select_shard(settings, "3/3")


def count_records(out: str) -> int:
    return sum(len(list_recorded_samples(setting)) for setting in Path(out, "settings").glob("*"))


def test_a_killed_run_resumes_without_lost_or_repeated_records() -> None:
    config = write_config({**SMALL, "batch_size": 1, "baselines": False})
    assert main(["ablate", config, "--out", "whole", "--quiet"]) == 0
    expected = remove_times(records("whole"))
    kills = 0
    for number in range(20):
        process = start(config, "--out", "killed")
        before = count_records("killed")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            count = (
                sum(len(list_recorded_samples(setting)) for setting in Path("killed/settings").glob("*"))
                if Path("killed/settings").is_dir()
                else 0
            )
            if number < 3 and count >= before + 30:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
    assert kills >= 2
    assert remove_times(records("killed")) == expected


def test_workers_share_the_images_and_shards_the_settings() -> None:
    config = write_config({**SMALL, "baselines": False})
    assert main(["ablate", config, "--out", "one", "--quiet"]) == 0
    assert start(config, "--out", "two", "--workers", "2").wait() == 0
    for number in range(2):
        assert main(["ablate", config, "--out", "parts", "--shard", f"{number}/2", "--quiet"]) == 0
    assert remove_times(records("one")) == remove_times(records("two")) == remove_times(records("parts"))
    assert not list(Path("two/settings").glob("*/records.part*"))


@pytest.mark.parametrize("name", sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("[hm]*/*.yaml")))
def test_a_shipped_grid_has_the_stated_number_of_runs(name: str) -> None:
    command_line, _, count_line, *_ = (CONFIGS / name).read_text().split("\n")
    assert command_line.startswith(f"# tokenprune ablate experiments/configs/{name}")
    assert len(expand(yaml.safe_load((CONFIGS / name).read_text()))) == int(count_line.split()[1])


def test_every_task_gets_its_own_baselines() -> None:
    boards = [{"class_path": "boards", "init_args": {"first": first}} for first in (1000, 2000)]
    settings = expand({"grid": {"task": boards, "reducer.budget": [0.1, 0.2]}})
    assert Counter(setting.role for setting in settings) == {"grid": 4, "full": 2, "baseline": 4 * 7}


def test_all_models_and_tasks_are_validated_before_the_first_run(capsys: pytest.CaptureFixture[str]) -> None:
    boards = {"class_path": "boards", "init_args": {"number": 1}}
    missing_folder = {"class_path": "folder", "init_args": {"path": "nowhere"}}
    grid = {"task": [boards, missing_folder], "model": ["mini", "./no_model"]}
    message = run_refused(capsys, "ablate", write_config({"grid": grid}), "--out", "out")
    assert "nowhere: no such file or folder" in message
    assert "./no_model: no such folder" in message
    assert not Path("out").exists()


def test_strategies_with_different_text_models_do_not_share() -> None:
    from tokenprune.strategies import CDPruner

    reducers = [HiRED(), CDPruner(text_model="a"), CDPruner(text_model="b"), UniformStride()]
    settings = [Setting(Experiment(reducer=reducer), str(number)) for number, reducer in enumerate(reducers)]
    assert [[setting.name for setting in group] for group in group_by_model(settings)] == [["0", "1", "3"], ["2"]]


def test_format_value() -> None:
    assert (
        format_value({"class_path": "a.b.TopAttentionSelection", "init_args": {"layer": [1, 2]}})
        == "TopAttentionSelection(layer=[1, 2])"
    )
    assert format_value({"class_path": "TopNormSelection"}) == "TopNormSelection"
    assert format_value(0.1) == "0.1"


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_boards_are_the_held_out_boards_in_order() -> None:
    samples = list(Boards(number=2).samples())
    assert [sample.id for sample in samples] == [sample.id for sample in Boards(number=2).samples()]
    assert {sample.group for sample in samples} == {"boards/1000", "boards/1001"}
    assert {sample.split for sample in samples} <= {"tiles", "base", "either"}
    assert set(tasks()) == {"Boards", "Folder", "LmmsTask"}


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
