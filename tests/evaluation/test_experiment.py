"""Experiments and ablations: records that survive, one encoding an image, and grids that are checked first."""

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

from tests.helpers.small_grid import SMALL, records, start, without_times
from tokenprune.cli.main import main
from tokenprune.experiments.evaluation import experiment as running
from tokenprune.experiments.evaluation.experiment import Experiment, Setting, run_settings
from tokenprune.experiments.evaluation.grid import by_model, expand, experiment_of, format_value, shard_of
from tokenprune.experiments.evaluation.records import InUseError, RecordFile, done, join, merge, read_lines
from tokenprune.experiments.evaluation.tasks import Boards, Folder, Sample, tasks
from tokenprune.models import mini
from tokenprune.strategies import SCOPE, HiRED, ImageDownsample, Random, UniformStride
from tokenprune.strategies.components import RandomSelection

CONFIGS = Path(__file__).parents[2] / "experiments/configs"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(config: dict[str, Any], name: str = "small.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(config))
    return name


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_dropped_and_written_again(tmp_path: Path) -> None:
    with RecordFile(tmp_path) as file:
        file.add({"sample": "a", "score": 1.0})
        file.add({"sample": "b", "score": 0.0})
    whole = (tmp_path / "records.jsonl").read_text()
    (tmp_path / "records.jsonl").write_text(whole + '{"sample": "c", "sco')
    assert done(tmp_path) == {"a", "b"}
    with RecordFile(tmp_path) as file:
        file.add({"sample": "c", "score": 1.0})
        with pytest.raises(ValueError, match="'c' has a record already"):
            file.add({"sample": "c", "score": 1.0})
    assert [row["sample"] for row in read_lines(tmp_path / "records.jsonl")] == ["a", "b", "c"]
    (tmp_path / "records.jsonl").write_text("{broken\n" + whole)
    with pytest.raises(ValueError, match=r"records.jsonl, line 1 is no record"):
        done(tmp_path)


def test_two_processes_cannot_write_the_same_records(tmp_path: Path) -> None:
    with RecordFile(tmp_path), pytest.raises(InUseError, match="another process writes to"):
        RecordFile(tmp_path)
    with RecordFile(tmp_path, 0), RecordFile(tmp_path, 1):  # parts of their own
        for rank in (None, 1):
            with pytest.raises(InUseError):
                RecordFile(tmp_path, rank)
    with RecordFile(tmp_path), pytest.raises(InUseError):
        RecordFile(tmp_path, 0)


def test_parts_are_left_alone_while_somebody_writes_or_samples_are_missing(tmp_path: Path) -> None:
    with RecordFile(tmp_path, 0) as one:
        one.add({"sample": "a"})
        join(tmp_path, ["a"])
    join(tmp_path, ["a", "b"])
    assert (tmp_path / "records.part-0.jsonl").is_file()
    with RecordFile(tmp_path, 1) as other:
        other.add({"sample": "b"})
    join(tmp_path, ["a", "b"])
    assert [row["sample"] for row in read_lines(tmp_path / "records.jsonl")] == ["a", "b"]
    assert not list(tmp_path.glob("records.part*"))


def test_parts_are_put_together_in_the_order_of_the_samples(tmp_path: Path) -> None:
    for rank, names in enumerate((["c", "a"], ["b"])):
        with RecordFile(tmp_path, rank) as file:
            for name in names:
                file.add({"sample": name})
    assert done(tmp_path) == {"a", "b", "c"}
    merge(tmp_path, ["a", "b", "c"])
    assert [row["sample"] for row in read_lines(tmp_path / "records.jsonl")] == ["a", "b", "c"]
    assert not list(tmp_path.glob("records.part*"))


# --- experiments ------------------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_setting_and_not_of_how_it_was_written() -> None:
    one = experiment_of(["--reducer", "HiRED", "--reducer.budget", "0.1", "--task", "boards"])
    other = experiment_of(["--task.number", "40", "--reducer.newlines=keep_rows", "--reducer.budget=0.1"])
    assert one.hash() == other.hash() == replace(one, device="cuda").hash()
    assert one.hash() != replace(one, seed=1).hash()
    text = yaml.safe_dump(one.config(), sort_keys=True)
    Path("again.yaml").write_text(text)
    assert experiment_of(["--config", "again.yaml"]) == one


def test_sharing_an_encoding_changes_nothing() -> None:
    """Alone, and beside strategies that read other signals: the same records."""
    task = Boards(number=2)
    settings = [
        Setting(Experiment(reducer=reducer, task=task, max_new_tokens=4, batch_size=32), type(reducer).__name__)
        for reducer in (HiRED(0.1), SCOPE(0.1), ImageDownsample(0.2), UniformStride(1.0))
    ]
    progress = run_settings(settings, Path("together"))
    assert (progress.images, progress.encodes, progress.more_encodes) == (2, 2, 2)
    for setting in settings:
        run_settings([setting], Path("alone"))
    assert without_times(records("together")) == without_times(records("alone"))
    assert progress.done == progress.total == sum(map(len, records("together").values()))


def test_what_is_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(Experiment(reducer=HiRED(0.1), task=Boards(number=2), max_new_tokens=4, batch_size=4), "HiRED")
    run_settings([setting], Path("out"))
    whole = without_times(records("out"))
    file = setting.folder(Path("out")) / "records.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]))  # in the middle of a batch
    progress = run_settings([setting], Path("out"))
    assert progress.total == len(lines)
    assert without_times(records("out")) == whole
    monkeypatch.setattr(running, "load", lambda *args: pytest.fail("nothing is left to do"))
    assert run_settings([setting], Path("out")).images == 0


def test_a_folder_says_all_about_its_experiment() -> None:
    setting = Setting(
        Experiment(reducer=HiRED(0.1), task=Boards(number=1), max_new_tokens=4, batch_size=32), "HiRED, 10 %"
    )
    run_settings([setting], Path("out"))
    folder = setting.folder(Path("out"))
    assert experiment_of(["--config", str(folder / "config.yaml")]) == setting.experiment
    said = json.loads((folder / "setting.json").read_text())
    assert (said["name"], said["strategy"], said["budget"], said["metric"]) == (
        "HiRED, 10 %",
        "HiRED",
        0.1,
        "exact_match",
    )
    around = json.loads((folder / "environment.json").read_text())
    assert {"torch", "transformers", "tokenprune", "device", "commit", "started"} <= set(around)
    (rows,) = records("out").values()
    assert all(row["kept"] == row["asked"] == sum(row["kept_per_tile"]) for row in rows)
    assert all(row["prompt_length"] < row["prompt_length_full"] and row["generate_ms"] > 0 for row in rows)
    assert sum(row["correct"] for row in rows) / len(rows) > 0.7


def test_an_unreadable_image_is_an_error_record_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    Image.open(mini.image_path()).save("good.png")
    Path("bad.png").write_text("no image")
    asked = {"question": "How many shapes are there?", "answer": "4"}
    rows = [{"image": name, **asked} for name in ("bad.png", "good.png")]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        "evaluate",
        "--task",
        "folder",
        "--task.path",
        "own.jsonl",
        "--max-new-tokens",
        "4",
        "--out",
        "out",
        "--quiet",
    ]
    for _ in range(2):  # the second time nothing is left to do, and the error still stands
        assert main(words) == 1
        assert "1 samples failed" in capsys.readouterr().err
    (found,) = records("out").values()
    assert [row["error"] is None for row in found] == [False, True]
    assert "not an image" in found[0]["error"]
    assert found[1]["prediction"] == "4"
    Image.open("good.png").save("bad.png")
    assert main([*words, "--retry-errors"]) == 0
    (found,) = records("out").values()
    assert sorted((row["image"], row["prediction"]) for row in found) == [("bad.png", "4"), ("good.png", "4")]


def test_samples_of_one_id_are_refused_before_anything_runs() -> None:
    class Twice(Boards):
        def samples(self) -> Iterator[Sample]:
            yield from itertools.chain(super().samples(), super().samples())

    with pytest.raises(ValueError, match="Twice: several samples have the id 'boards/1000/0'"):
        run_settings([Setting(Experiment(task=Twice(1)), "x")], Path("out"))


def test_no_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert running._commit() is None


def test_a_strategy_that_cannot_run_on_the_model_is_named_before_anything_runs() -> None:
    from tokenprune.strategies import CDPruner

    reducers = {"a": HiRED(), "b": CDPruner()}
    settings = [Setting(Experiment(reducer=reducer, task=Boards(1)), name) for name, reducer in reducers.items()]
    with pytest.raises(ValueError, match=r"b: reads the question; set reducer.text_model"):
        run_settings(settings, Path("out"))
    assert not any(records("out").values())


def test_a_full_disk_loses_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(Experiment(reducer=HiRED(0.1), task=Boards(number=1), max_new_tokens=4, batch_size=32), "HiRED")
    add, count = RecordFile.add, []

    def full(self: RecordFile, record: Any) -> None:
        count.append(1)
        if len(count) == 4:
            self._out.write('{"sample": "half')
            self._out.flush()
            raise OSError(28, "No space left on device")
        add(self, record)

    monkeypatch.setattr(RecordFile, "add", full)
    with pytest.raises(OSError, match="No space left"):
        run_settings([setting], Path("out"))
    assert len(done(setting.folder(Path("out")))) == 3
    monkeypatch.setattr(RecordFile, "add", add)
    progress = run_settings([setting], Path("out"))
    (rows,) = records("out").values()
    assert len(rows) == progress.total == len({row["sample"] for row in rows})


# --- ablations --------------------------------------------------------------------------------------------------------


def test_a_grid_has_the_rows_that_every_table_needs() -> None:
    settings = expand(SMALL)
    assert Counter(setting.role for setting in settings) == {"grid": 4, "full": 1, "baseline": 2 * 7}
    assert len({setting.experiment.hash() for setting in settings}) == len(settings)
    assert settings[1].name == "HiRED, budget=0.05, selection=TopAttentionSelection(layer=first)"
    assert settings[1].factors == {"reducer.budget": "0.05", "reducer.selection": "TopAttentionSelection(layer=first)"}
    seeds = [setting.experiment.reducer for setting in settings if "Random" in setting.name]
    assert [one.selection for one in seeds[:3]] == [RandomSelection(seed) for seed in range(3)]  # type: ignore[attr-defined]
    assert len(expand({**SMALL, "baselines": False})) == 4
    assert len(expand({**SMALL, "random_seeds": 1})) == 19 - 4


def test_whole_strategies_and_presets_can_be_varied() -> None:
    config = {**SMALL, "grid": {"reducer": ["HiRED.release", "scope"], "reducer.budget": [0.1]}, "baselines": False}
    one, other = expand(config)
    assert one.experiment.reducer == HiRED.release(0.1)
    assert other.experiment.reducer == SCOPE(0.1)
    assert (one.name, other.name) == ("reducer=HiRED.release, budget=0.1", "reducer=scope, budget=0.1")


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
def test_what_is_wrong_is_found_before_anything_runs(
    change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        expand({**SMALL, **change})
    assert main(["ablate", write({**SMALL, **change}), "--out", "out"]) == 2
    assert not Path("out").exists()


def test_a_directory_of_another_ablation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        **SMALL,
        "grid": {"reducer.budget": [0.1]},
        "baselines": False,
        "task": {"class_path": "boards", "init_args": {"number": 1}},
    }
    assert main(["ablate", write(config), "--out", "out", "--quiet"]) == 0
    before = records("out")
    assert main(["ablate", write(config), "--out", "out"]) == 0
    assert "0 (all was done)" in capsys.readouterr().err
    assert records("out") == before
    assert main(["ablate", write({**config, "seed": 0, "dtype": "auto"}), "--out", "out", "--quiet"]) == 0
    assert "holds another ablation" in refused(capsys, "ablate", write({**config, "seed": 3}), "--out", "out")
    assert "no such file" in refused(capsys, "ablate", "nowhere.yaml")


def test_shards_are_parts_of_the_grid() -> None:
    settings = expand(SMALL)
    parts = [shard_of(settings, f"{number}/3") for number in range(3)]
    found = sorted(setting.experiment.hash() for part in parts for setting in part)
    assert found == sorted(setting.experiment.hash() for setting in settings)
    with pytest.raises(ValueError, match="write i/n"):
        shard_of(settings, "3/3")


def written(out: str) -> int:
    return sum(len(done(setting)) for setting in Path(out, "settings").glob("*"))


def test_killed_at_any_moment_it_goes_on_without_loss_or_doubling() -> None:
    config = write({**SMALL, "batch_size": 1, "random_seeds": 1})
    assert start(config, "--out", "whole").wait() == 0
    expected = without_times(records("whole"))
    kills = 0
    for number in range(20):
        process = start(config, "--out", "killed")
        seen = written("killed")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            now = (
                sum(len(done(setting)) for setting in Path("killed/settings").glob("*"))
                if Path("killed/settings").is_dir()
                else 0
            )
            if number < 3 and now >= seen + 60:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
    assert kills >= 2
    assert without_times(records("killed")) == expected


def test_workers_share_the_images_and_shards_the_settings() -> None:
    config = write({**SMALL, "random_seeds": 1})
    assert start(config, "--out", "one").wait() == 0
    assert start(config, "--out", "two", "--workers", "2").wait() == 0
    for number in range(2):
        assert start(config, "--out", "parts", "--shard", f"{number}/2").wait() == 0
    assert without_times(records("one")) == without_times(records("two")) == without_times(records("parts"))
    assert not list(Path("two/settings").glob("*/records.part*"))


@pytest.mark.parametrize("name", sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("[hm]*/*.yaml")))
def test_a_shipped_grid_makes_as_many_runs_as_it_says(name: str) -> None:
    first, _, third, *_ = (CONFIGS / name).read_text().split("\n")
    assert first.startswith(f"# tokenprune ablate experiments/configs/{name}")
    assert len(expand(yaml.safe_load((CONFIGS / name).read_text()))) == int(third.split()[1])


def test_every_model_and_task_gets_its_own_rows() -> None:
    boards = [{"class_path": "boards", "init_args": {"first": first}} for first in (1000, 2000)]
    settings = expand({"grid": {"task": boards, "reducer.budget": [0.1, 0.2]}})
    assert Counter(setting.role for setting in settings) == {"grid": 4, "full": 2, "baseline": 4 * 7}


def test_all_models_and_tasks_are_looked_at_before_the_first_runs(capsys: pytest.CaptureFixture[str]) -> None:
    boards = {"class_path": "boards", "init_args": {"number": 1}}
    lost = {"class_path": "folder", "init_args": {"path": "nowhere"}}
    grid = {"task": [boards, lost], "model": ["mini", "./no_model"]}
    said = refused(capsys, "ablate", write({"grid": grid}), "--out", "out")
    assert "nowhere: no such file or folder" in said
    assert "./no_model: no such folder" in said
    assert not Path("out").exists()


def test_strategies_with_different_text_models_do_not_share() -> None:
    from tokenprune.strategies import CDPruner

    reducers = [HiRED(), CDPruner(text_model="a"), CDPruner(text_model="b"), UniformStride()]
    settings = [Setting(Experiment(reducer=one), str(number)) for number, one in enumerate(reducers)]
    assert [[setting.name for setting in group] for group in by_model(settings)] == [["0", "1", "3"], ["2"]]


def test_values_in_words() -> None:
    assert (
        format_value({"class_path": "a.b.TopAttentionSelection", "init_args": {"layer": [1, 2]}})
        == "TopAttentionSelection(layer=[1, 2])"
    )
    assert format_value({"class_path": "TopNormSelection"}) == "TopNormSelection"
    assert format_value(0.1) == "0.1"


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_boards_are_the_held_out_ones_in_order() -> None:
    samples = list(Boards(number=2).samples())
    assert [sample.id for sample in samples] == [sample.id for sample in Boards(number=2).samples()]
    assert {sample.group for sample in samples} == {"boards/1000", "boards/1001"}
    assert {sample.split for sample in samples} <= {"tiles", "base", "either"}
    assert set(tasks()) == {"Boards", "Folder", "LmmsTask"}


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_a_task_of_lmms_eval_without_lmms_eval_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    task = {"class_path": "lmms-task", "init_args": {"name": "textvqa_val"}}
    config = write({"task": task, "grid": {"reducer.budget": [0.2]}})
    assert main(["ablate", config, "--dry-run"]) == 0
    assert "9 settings" in capsys.readouterr().out
    assert main(["ablate", config]) == 2
    assert 'LmmsTask needs lmms-eval, which is not installed here: pip install -e ".[lmms]"' in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["jsonl", "imagefolder", "csv"])
def test_an_own_folder(layout: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    if layout == "csv":
        (tmp_path / "metadata.csv").write_text("file_name,question,answer\na.png,What color?,red\n")
    elif layout == "imagefolder":
        row = {"file_name": "a.png", "question": "What color?", "answer": ["red", "crimson"]}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    else:
        (tmp_path / "own.jsonl").write_text(json.dumps({"image": "a.png", "question": "What color?", "answer": "red"}))
    task = Folder(str(tmp_path if layout != "jsonl" else tmp_path / "own.jsonl"))
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
def test_what_is_wrong_with_a_file_is_said(text: str, message: str) -> None:
    Path("own.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(Folder("own.jsonl").samples())


def image(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), color).save(path)


def test_metadata_in_folders_below(tmp_path: Path) -> None:
    for folder in ("train", "test"):
        image(tmp_path / folder / "deep" / "a.png", "red" if folder == "train" else "blue")
        (tmp_path / folder / "metadata.csv").write_text(
            "\ufefffile_name,question,answer\ndeep/a.png,What color?,red\n", encoding="utf-8"
        )
    one, other = Folder(str(tmp_path)).samples()
    assert (one.id, other.id) == ("test/metadata/2", "train/metadata/2")
    assert (one.group, other.group) == ("test/deep/a.png", "train/deep/a.png")
    assert one.image().getpixel((0, 0)) == (0, 0, 255)
    assert other.image().getpixel((0, 0)) == (255, 0, 0)


def test_folders_named_by_their_label(tmp_path: Path) -> None:
    for color in ("red", "blue"):
        image(tmp_path / color / "a.png", color)
    with pytest.raises(ValueError, match=r"--task.question"):
        list(Folder(str(tmp_path)).samples())
    found = list(Folder(str(tmp_path), question="What color?").samples())
    assert [(one.id, one.answers) for one in found] == [("blue/a.png", ("blue",)), ("red/a.png", ("red",))]
    assert found[0].image().getpixel((0, 0)) == (0, 0, 255)


def test_answers_and_texts_that_look_empty_or_broken_are_neither() -> None:
    rows = [
        {"id": 0, "image": "a.png", "question": "How many?", "answer": 0},
        {"image": "a.png", "question": "one\u2028two", "answer": "b"},
    ]
    Path("own.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    one, other = Folder("own.jsonl").samples()
    assert (one.id, one.answers) == ("0", ("0",))
    assert other.question == "one\u2028two"


def test_a_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metadata.jsonl"):
        list(Folder(str(tmp_path)).samples())
    with pytest.raises(ValueError, match="no such file or folder"):
        list(Folder("nowhere").samples())
    with pytest.raises(ValueError, match="score_by='accuracy' is not known"):
        Folder("x", score_by="accuracy")


def test_sampling_is_by_seed() -> None:
    one = Experiment(reducer=Random(0.1), task=Boards(number=1), max_new_tokens=4, batch_size=32, temperature=5.0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_settings([Setting(replace(one, seed=seed), "x")], Path(name))
    texts = [[row["prediction"] for rows in records(name).values() for row in rows] for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert torch.is_grad_enabled()
