"""Weights & Biases: what a run holds, read back from disk, and that nothing it does can hurt."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.wandb_runs import forget_account, media, read_back, values
from tokenprune import Selection, TileGeometry
from tokenprune.experiments.tracking import tracker as tracking
from tokenprune.experiments.tracking.tracker import GAP, Tracker, image_and_mask, metrics, tracked

CONFIG = {"reducer": {"class_path": "HiRED", "init_args": {"budget": 0.1}}, "seed": 0}
RECORD = {"sample": "boards/1", "answer": ["3", "three"], "prediction": "3", "score": 1.0, "correct": True, "kept": 10}


@pytest.fixture(autouse=True)
def without_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_account(monkeypatch, tmp_path)


def selection(tile_grid: tuple[int, int] = (2, 2), image_size: tuple[int, int] = (80, 80)) -> Selection:
    """A selection over tiles of 40 x 40 pixels, each of its own shade, and 4 x 4 tokens; it keeps token 5 + tile."""
    if tile_grid == (0, 0):
        geometry = TileGeometry.single((4, 4))
    else:
        geometry = TileGeometry.anyres(image_size, tile_grid, (4, 4), 40)
    kept = torch.zeros(geometry.tiles, geometry.tokens, dtype=torch.bool)
    kept[torch.arange(geometry.tiles), 5 + torch.arange(geometry.tiles)] = True
    kept &= geometry.valid
    shades = torch.arange(geometry.tiles, dtype=torch.uint8) * 20
    pixels = shades[:, None, None, None].expand(geometry.tiles, 40, 40, 3)
    return Selection(geometry, kept, asked=int(kept.sum()), pixels=pixels)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A whole run that wandb wrote without a key, read back."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "config.yaml").write_text("seed: 0\n")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    tracking.log.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        forget_account(patch, folder)
        with tracked(
            "proj", group="ablation", tags=["HiRED", "mini"], name="HiRED 10 %", config=CONFIG, directory=folder / "out"
        ) as tracker:
            place = tracker.folder
            for number in range(3):
                tracker.record({**RECORD, "score": number / 2, "kept": 10 + number, "select_ms": 0.5 * number})
            tracker.record({"sample": "boards/2", "score": 0.0, "kept": 0, "select_ms": 0.0, "error": "broken"})
            tracker.overlay("boards/1000/3", selection())
            tracker.pareto([{"name": "a", "kept": 10, "score": 0.5}, {"name": "b", "kept": 20, "score": 0.4}])
            tracker.finish({"accuracy": 0.75, "by_type": {"count": 0.5}, "note": "x"}, [folder / "config.yaml"])
    tracking.log.removeHandler(handler)
    assert place is not None
    records: dict[str, list[Any]] = {}
    until = time.monotonic() + 30
    while "exit" not in records and time.monotonic() < until:  # wandb writes the file some time after it is done
        records.clear()
        for record in read_back(place):
            kind = record.WhichOneof("record_type")
            records.setdefault(kind, []).append(getattr(record, kind))
        time.sleep(0.01)
    history: list[dict[str, Any]] = [values(one.item) for one in records["history"]]
    summary: dict[str, Any] = {}
    for one in records["summary"]:
        summary |= values(one.update)
    return SimpleNamespace(folder=place, messages=messages, records=records, history=history, summary=summary)


def test_a_run_is_offline_and_says_how_to_upload_it(run: SimpleNamespace) -> None:
    assert run.folder.name.startswith("offline-run-")
    assert run.folder.parents[1].name == "out"
    assert run.messages == [f"W&B works offline; upload later with: wandb sync {run.folder}"]
    assert run.records["exit"][0].exit_code == 0


def test_a_run_has_its_names_and_its_nested_configuration(run: SimpleNamespace) -> None:
    head = run.records["run"][0]
    assert (head.project, head.run_group, head.job_type, head.display_name) == (
        "proj",
        "ablation",
        "evaluate",
        "HiRED 10 %",
    )
    assert list(head.tags) == ["HiRED", "mini"]
    config = values(head.config.update)
    for update in run.records.get("config", []):
        config |= values(update.update)
    assert {key: config[key] for key in CONFIG} == CONFIG


def test_results_stand_over_kept_tokens(run: SimpleNamespace) -> None:
    rules = {one.name or one.glob_name: one.step_metric for one in run.records["metric"]}
    assert rules["eval/*"] == rules["perf/*"] == "eval/tokens_kept"
    assert rules["progress/*"] == "progress/samples"
    (results,) = [row for row in run.history if "eval/accuracy" in row]
    wanted = {
        "eval/accuracy": 0.75,
        "eval/by_type/count": 0.5,
        "eval/tokens_kept": 11,  # the broken sample does not count
        "eval/score": 0.5,
        "eval/samples": 4,
        "eval/errors": 1,
        "perf/select_ms": 0.5,
    }
    assert {key: value for key, value in results.items() if key.startswith(("eval/", "perf/"))} == wanted
    assert {key: run.summary[key] for key in wanted} == wanted
    assert run.summary["eval/note"] == "x"
    assert not any("_type" in str(value) for key, value in run.summary.items() if key.startswith("eval/"))


def test_the_course_of_the_run_is_logged(run: SimpleNamespace) -> None:
    course = [row for row in run.history if "progress/samples" in row]
    assert [row["progress/samples"] for row in course] == [1, 2, 3, 4]
    assert [row.get("progress/score") for row in course] == [0.0, 0.25, 0.5, None]
    assert [row["progress/errors"] for row in course] == [0, 0, 0, 1]


def test_answers_stand_in_a_table(run: SimpleNamespace) -> None:
    entry = media(run, "samples/predictions")
    table = json.loads((run.folder / "files" / entry["path"]).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["sample"] for row in rows] == ["boards/1"] * 3 + ["boards/2"]
    assert rows[0]["answer"] == "['3', 'three']"
    assert [row["kept"] for row in rows] == [10, 11, 12, 0]
    assert rows[3]["error"] == "broken"


def test_kept_and_dropped_tokens_are_masks_of_an_image(run: SimpleNamespace) -> None:
    entry = media(run, "vis/selection/boards-1000-3")
    pixels, mask = image_and_mask(selection())
    assert np.array_equal(np.asarray(Image.open(run.folder / "files" / entry["path"]).convert("RGB")), pixels)
    stored = entry["masks"]["tokens"]["path"] if "masks" in entry else entry["masks.tokens.path"]
    assert np.array_equal(np.asarray(Image.open(run.folder / "files" / stored)), mask)
    labels = json.dumps([values(one.update) for one in run.records.get("config", [])])
    assert all(name in labels for name in ("kept", "dropped", "padding"))


def test_the_pareto_plot_has_its_table(run: SimpleNamespace) -> None:
    table = json.loads((run.folder / "files" / media(run, "vis/pareto_table")["path"]).read_text())
    assert table["columns"] == ["name", "kept", "score", "front"]
    assert table["data"] == [["a", 10, 0.5, True], ["b", 20, 0.4, False]]


def test_files_are_kept_as_an_artifact(run: SimpleNamespace) -> None:
    (artifact,) = [one for one in run.records["artifact"] if one.type == "experiment"]
    assert [entry.path for entry in artifact.manifest.contents] == ["config.yaml"]


def test_the_mask_follows_the_tiles() -> None:
    one = selection((2, 2), (40, 80))  # rows above and below are padding
    pixels, mask = image_and_mask(one)
    assert pixels.shape == (2 * 40 + GAP, 40 + 3 * GAP + 2 * 40 + GAP, 3)
    assert mask.shape == pixels.shape[:2]
    for tile in range(one.geometry.tiles):
        row, col = divmod(tile - 1, 2) if tile else (0, 0)
        top, left = (row * (40 + GAP), 40 + 3 * GAP + col * (40 + GAP)) if tile else (0, 0)
        part = mask[top : top + 40, left : left + 40]
        assert (pixels[top : top + 40, left : left + 40] == tile * 20).all()
        assert (part == 1).sum() == 100 * int(one.kept[tile].sum())
        assert (part == 3).sum() == 100 * int((~one.geometry.valid[tile]).sum())
        assert (part > 0).all()
        for token in one.kept[tile].nonzero()[:, 0].tolist():
            assert part[token // 4 * 10 + 5, token % 4 * 10 + 5] == 1
    assert (mask == 0).sum() == mask.size - one.geometry.tiles * 1600
    single = image_and_mask(selection((0, 0)))[1]
    assert single.shape == (40, 40)


def test_costs_are_told_from_results() -> None:
    named = metrics({"ttft_ms": 1, "accuracy": 2, "kept": 3, "by": {"split": {"small": 4}}, "perf/x": 5, "kv_bytes": 6})
    assert named == {
        "perf/ttft_ms": 1,
        "eval/accuracy": 2,
        "eval/tokens_kept": 3,
        "eval/by/split/small": 4,
        "perf/x": 5,
        "perf/kv_bytes": 6,
    }


class FakeRun:
    """A run of a wandb that fails where it is told to."""

    def __init__(self, folder: Path, fails: str = "") -> None:
        self.id, self.dir, self.fails = "fake", str(folder / "files"), fails
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.logged: list[Any] = []
        self.codes: list[int] = []

    def define_metric(self, *args: Any, **options: Any) -> None:
        self._maybe("define_metric")

    def log(self, data: dict[str, Any]) -> None:
        self._maybe("log")
        self.logged.append(data)

    def log_artifact(self, artifact: Any) -> None:
        self._maybe("log_artifact")

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)
        self._maybe("finish")

    def _maybe(self, method: str) -> None:
        if self.fails == method:
            raise RuntimeError(f"{method} does\nnot work")


def install(monkeypatch: pytest.MonkeyPatch, run: FakeRun, refuse: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Put a false wandb in place; returns what its `init` is called with."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> FakeRun:
        calls.append(options)
        if options["mode"] in refuse:
            raise TimeoutError("no answer")
        return run

    def anything(*args: Any, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(add_file=lambda file: None)

    fake = SimpleNamespace(
        init=init, Settings=SimpleNamespace, Image=anything, Table=anything, Artifact=anything, plot=SimpleNamespace()
    )
    fake.plot.scatter = anything
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return calls


def use(folder: Path, project: str | None = "proj") -> Tracker:
    """Do everything that an experiment does."""
    (folder / "config.yaml").write_text("seed: 0\n")
    with tracked(project, config=CONFIG, directory=folder) as tracker:
        tracker.record(RECORD)
        tracker.overlay("one", selection())
        tracker.pareto([{"name": "a", "kept": 1, "score": 1.0}])
        tracker.finish({"accuracy": 1.0}, [folder / "config.yaml"])
        tracker.finish()
    return tracker


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize("fails", ["define_metric", "log", "log_artifact", "finish"])
def test_a_failure_is_one_warning(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    run = FakeRun(tmp_path, fails)
    install(monkeypatch, run)
    assert not use(tmp_path).active
    assert warnings_of(caplog) == [
        f"W&B does not work, so the run goes on without it: RuntimeError: {fails} does not work"
    ]
    assert run.codes[-1] == 1


def test_wandb_that_does_not_start_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = install(monkeypatch, FakeRun(tmp_path), refuse=("offline", "online"))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    use(tmp_path)
    assert [call["mode"] for call in calls] == ["online", "offline"]
    assert warnings_of(caplog) == ["W&B does not work, so the run goes on without it: TimeoutError: no answer"]


def test_wandb_that_is_not_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(tmp_path)
    (warning,) = warnings_of(caplog)
    assert "goes on without it" in warning
    assert "pip install wandb" in warning


def test_a_server_that_does_not_answer_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun(tmp_path)
    install(monkeypatch, run, refuse=("online",))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    use(tmp_path)
    (warning,) = warnings_of(caplog)
    assert "offline (TimeoutError: no answer)" in warning
    assert f"wandb sync {tmp_path}" in warning
    assert any("eval/accuracy" in row for row in run.logged)
    assert run.codes == [0]


def test_a_run_that_breaks_is_marked_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path)
    install(monkeypatch, run)
    with pytest.raises(KeyboardInterrupt), tracked("proj", directory=tmp_path):
        raise KeyboardInterrupt
    assert run.codes == [1]


def test_the_mode_is_the_users_or_follows_from_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.chosen_mode() == "offline"
    (tmp_path / "netrc").write_text("machine elsewhere.org login user password x\n")
    assert tracking.chosen_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert tracking.chosen_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert tracking.chosen_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert tracking.chosen_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.chosen_mode() == "offline"


def test_nothing_happens_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path)
    calls = install(monkeypatch, run)
    use(tmp_path, None)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    use(tmp_path)
    assert not calls
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")  # an agent names the project itself
    use(tmp_path, None)
    assert len(calls) == 1


def test_parameters_of_a_sweep_stay_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path)
    run.config["reducer"] = "HiRED"
    install(monkeypatch, run)
    use(tmp_path)
    assert run.config == {"reducer": "HiRED", "resolved.reducer": CONFIG["reducer"], "seed": 0}


def test_images_have_a_limit_and_need_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun(tmp_path)
    install(monkeypatch, run)
    monkeypatch.setattr(tracking, "MAX_IMAGES", 2)
    one = selection()
    with tracked("proj", directory=tmp_path) as tracker:
        tracker.overlay("none", Selection(one.geometry, one.kept, one.asked))
        for name in "abcd":
            tracker.overlay(name, one)
        assert tracker.active
    assert [key for row in run.logged for key in row] == ["vis/selection/a", "vis/selection/b"]
    assert sum("first 2 images" in warning for warning in warnings_of(caplog)) == 1


def test_files_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, FakeRun(tmp_path))
    with tracked("proj", directory=tmp_path) as tracker:
        tracker.finish({}, [tmp_path / "none.yaml"])
    assert any("none.yaml is not there" in warning for warning in warnings_of(caplog))


def test_wandb_is_imported_when_it_is_needed() -> None:
    code = "import sys; import tokenprune.experiments.tracking.tracker; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
