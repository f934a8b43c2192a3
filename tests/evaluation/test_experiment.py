"""Experiments: one encoding per image, resuming from records, errors of samples, and checks before a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.helpers.small_grid import records, remove_times
from tokenprune.cli.main import main
from tokenprune.decoder_reducer import AtLayer
from tokenprune.experiments.evaluation import environment
from tokenprune.experiments.evaluation import experiment as running
from tokenprune.experiments.evaluation.experiment import Experiment, Setting, run_settings
from tokenprune.experiments.evaluation.grid import parse_experiment
from tokenprune.experiments.evaluation.records import (
    RecordFile,
    list_recorded_samples,
)
from tokenprune.experiments.evaluation.tasks import Boards, Sample
from tokenprune.models import mini
from tokenprune.strategies import SCOPE, HiRED, ImageDownsample, ToMe, UniformStride

pytestmark = pytest.mark.usefixtures("in_empty_folder")


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
        Setting(Experiment(reducer=reducer, task=task, max_new_tokens=4, batch_size=32), reducer.label)
        for reducer in (
            HiRED(0.1),
            SCOPE(0.1),
            ImageDownsample(0.2),
            UniformStride(1.0),
            AtLayer(1, HiRED(0.2)),
            HiRED(0.4) >> AtLayer(1, UniformStride(0.5)),
            ToMe(r=4) >> HiRED(0.4),
            ToMe(r=4) >> SCOPE(0.1),
        )
    ]
    progress = run_settings(settings, Path("together"))
    # Both settings with ToMe share an encoding.
    assert (progress.images, progress.encodes, progress.more_encodes) == (2, 2, 4)
    for setting in settings:
        run_settings([setting], Path("alone"))
    assert remove_times(records("together")) == remove_times(records("alone"))
    together = records("together")
    for setting in settings:
        rows = together[setting.folder(Path("together")).name]
        counts = {(row["tower_flops"], row["tower_flops_full"]) for row in rows}
        acts_in_tower = setting.name.startswith("ToMe")
        assert all((0 < flops < full) if acts_in_tower else flops is full is None for flops, full in counts)
    assert progress.done == progress.total == sum(map(len, records("together").values()))


def test_records_have_the_tokens_of_each_stage() -> None:
    reducer = HiRED(0.4) >> AtLayer(1, UniformStride(0.5))
    setting = Setting(Experiment(reducer=reducer, task=Boards(number=1), max_new_tokens=1, batch_size=2), "composed")
    run_settings([setting], Path("out"))
    (rows,) = records("out").values()
    for row in rows:
        (cut,) = row["cuts"]
        entered, *later = row["tokens_per_layer"]
        assert (cut["layer"], cut["asked"], cut["kept"]) == (1, row["kept"] // 2, row["kept"] // 2)
        assert later == [later[0]] * 2
        assert entered == row["prompt_length"]
        assert row["average_tokens"] == (row["kept"] + 2 * cut["kept"]) / 3
        assert 0 < row["prefill_flops"] < row["prefill_flops_full"]
        assert (row["evidence_coverage"] is None) == (row["type"] == "paper")
    metadata = json.loads((setting.folder(Path("out")) / "setting.json").read_text())
    assert metadata["strategy"] == "HiRED+AtLayer(UniformStride)"
    assert metadata["budget"] == "40% + 50% from layer 1"


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
        assert "1 sample failed" in capsys.readouterr().err
    (recorded,) = records("out").values()
    assert [row["error"] is None for row in recorded] == [False, True]
    assert "not an image" in recorded[0]["error"]
    assert recorded[1]["prediction"] == "4"
    assert recorded[0]["prepare_alone_ms"] is None
    assert recorded[1]["prepare_alone_ms"] > 0
    Image.open("good.png").save("bad.png")
    capsys.readouterr()
    assert main([*command[:-1], "--retry-errors"]) == 0
    assert "HiRED   100.0 [100.0, 100.0]" in capsys.readouterr().out  # --quiet prints no results
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
    assert environment._read_commit() is None


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
