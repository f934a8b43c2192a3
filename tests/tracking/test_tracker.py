"""Weights & Biases: the content of a run on disk; a failure of W&B never stops an experiment."""

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

from tests.helpers.wandb_runs import hide_account, media, read_records, values
from tokenprune import Selection, TileGeometry
from tokenprune.experiments.tracking import tracker as tracking
from tokenprune.experiments.tracking.tracker import Tracker, track_run
from tokenprune.experiments.tracking.values import GAP, flatten_summary, image_and_mask

CONFIG = {"reducer": {"class_path": "HiRED", "init_args": {"budget": 0.1}}, "seed": 0}
RECORD = {"sample": "boards/1", "answer": ["3", "three"], "prediction": "3", "score": 1.0, "correct": True, "kept": 10}


@pytest.fixture(autouse=True)
def without_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_account(monkeypatch, tmp_path)


def make_selection(tile_grid: tuple[int, int] = (2, 2), image_size: tuple[int, int] = (80, 80)) -> Selection:
    """Return a selection over shaded tiles of 40 x 40 pixels and 4 x 4 tokens; each tile keeps token 5 + tile."""
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
    """Read a complete run that wandb wrote without an API key."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "config.yaml").write_text("seed: 0\n")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    tracking.log.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        hide_account(patch, folder)
        with track_run(
            "proj", group="ablation", tags=["HiRED", "mini"], name="HiRED 10 %", config=CONFIG, directory=folder / "out"
        ) as tracker:
            run_folder = tracker.folder
            for number in range(3):
                tracker.log_record({**RECORD, "score": number / 2, "kept": 10 + number, "select_ms": 0.5 * number})
            tracker.log_record({"sample": "boards/2", "score": 0.0, "kept": 0, "select_ms": 0.0, "error": "broken"})
            tracker.log_overlay("boards/1000/3", make_selection())
            tracker.log_pareto([{"name": "a", "kept": 10, "score": 0.5}, {"name": "b", "kept": 20, "score": 0.4}])
            tracker.finish({"accuracy": 0.75, "by_type": {"count": 0.5}, "note": "x"}, [folder / "config.yaml"])
    tracking.log.removeHandler(handler)
    assert run_folder is not None
    records: dict[str, list[Any]] = {}
    deadline = time.monotonic() + 30
    while "exit" not in records and time.monotonic() < deadline:  # wandb writes the file with a delay
        records.clear()
        for record in read_records(run_folder):
            kind = record.WhichOneof("record_type")
            records.setdefault(kind, []).append(getattr(record, kind))
        time.sleep(0.01)
    history: list[dict[str, Any]] = [values(record.item) for record in records["history"]]
    summary: dict[str, Any] = {}
    for record in records["summary"]:
        summary |= values(record.update)
    return SimpleNamespace(folder=run_folder, messages=messages, records=records, history=history, summary=summary)


def test_a_run_is_offline_and_logs_the_upload_command(run: SimpleNamespace) -> None:
    assert run.folder.name.startswith("offline-run-")
    assert run.folder.parents[1].name == "out"
    assert run.messages == [f"W&B logs offline; upload later with: wandb sync {run.folder}"]
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


def test_results_are_plotted_over_kept_tokens(run: SimpleNamespace) -> None:
    step_metrics = {metric.name or metric.glob_name: metric.step_metric for metric in run.records["metric"]}
    assert step_metrics["eval/*"] == step_metrics["perf/*"] == "eval/tokens_kept"
    assert step_metrics["progress/*"] == "progress/samples"
    (results,) = [row for row in run.history if "eval/accuracy" in row]
    expected = {
        "eval/accuracy": 0.75,
        "eval/by_type/count": 0.5,
        "eval/tokens_kept": 11,  # without the failed sample
        "eval/score": 0.5,
        "eval/samples": 4,
        "eval/errors": 1,
        "perf/select_ms": 0.5,
    }
    assert {key: value for key, value in results.items() if key.startswith(("eval/", "perf/"))} == expected
    assert {key: run.summary[key] for key in expected} == expected
    assert run.summary["eval/note"] == "x"
    assert not any("_type" in str(value) for key, value in run.summary.items() if key.startswith("eval/"))


def test_progress_is_logged(run: SimpleNamespace) -> None:
    progress = [row for row in run.history if "progress/samples" in row]
    assert [row["progress/samples"] for row in progress] == [1, 2, 3, 4]
    assert [row.get("progress/score") for row in progress] == [0.0, 0.25, 0.5, None]
    assert [row["progress/errors"] for row in progress] == [0, 0, 0, 1]


def test_predictions_are_logged_as_a_table(run: SimpleNamespace) -> None:
    entry = media(run, "samples/predictions")
    table = json.loads((run.folder / "files" / entry["path"]).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["sample"] for row in rows] == ["boards/1"] * 3 + ["boards/2"]
    assert rows[0]["answer"] == "['3', 'three']"
    assert [row["kept"] for row in rows] == [10, 11, 12, 0]
    assert rows[3]["error"] == "broken"


def test_kept_and_dropped_tokens_are_masks_of_an_image(run: SimpleNamespace) -> None:
    entry = media(run, "vis/selection/boards-1000-3")
    pixels, mask = image_and_mask(make_selection())
    assert np.array_equal(np.asarray(Image.open(run.folder / "files" / entry["path"]).convert("RGB")), pixels)
    mask_path = entry["masks"]["tokens"]["path"] if "masks" in entry else entry["masks.tokens.path"]
    assert np.array_equal(np.asarray(Image.open(run.folder / "files" / mask_path)), mask)
    labels = json.dumps([values(update.update) for update in run.records.get("config", [])])
    assert all(name in labels for name in ("kept", "dropped", "padding"))


def test_the_pareto_plot_has_its_table(run: SimpleNamespace) -> None:
    table = json.loads((run.folder / "files" / media(run, "vis/pareto_table")["path"]).read_text())
    assert table["columns"] == ["name", "kept", "score", "front"]
    assert table["data"] == [["a", 10, 0.5, True], ["b", 20, 0.4, False]]


def test_files_are_logged_as_an_artifact(run: SimpleNamespace) -> None:
    (artifact,) = [record for record in run.records["artifact"] if record.type == "experiment"]
    assert [entry.path for entry in artifact.manifest.contents] == ["config.yaml"]


def test_the_mask_has_the_layout_of_the_tiles() -> None:
    selection = make_selection((2, 2), (40, 80))  # rows above and below are padding
    pixels, mask = image_and_mask(selection)
    assert pixels.shape == (2 * 40 + GAP, 40 + 3 * GAP + 2 * 40 + GAP, 3)
    assert mask.shape == pixels.shape[:2]
    for tile in range(selection.geometry.tiles):
        row, col = divmod(tile - 1, 2) if tile else (0, 0)
        top, left = (row * (40 + GAP), 40 + 3 * GAP + col * (40 + GAP)) if tile else (0, 0)
        part = mask[top : top + 40, left : left + 40]
        assert (pixels[top : top + 40, left : left + 40] == tile * 20).all()
        assert (part == 1).sum() == 100 * int(selection.kept[tile].sum())
        assert (part == 3).sum() == 100 * int((~selection.geometry.valid[tile]).sum())
        assert (part > 0).all()
        for token in selection.kept[tile].nonzero()[:, 0].tolist():
            assert part[token // 4 * 10 + 5, token % 4 * 10 + 5] == 1
    assert (mask == 0).sum() == mask.size - selection.geometry.tiles * 1600
    single = image_and_mask(make_selection((0, 0)))[1]
    assert single.shape == (40, 40)


def test_costs_and_results_have_different_prefixes() -> None:
    keys = flatten_summary(
        {"ttft_ms": 1, "accuracy": 2, "kept": 3, "by": {"split": {"small": 4}}, "perf/x": 5, "kv_bytes": 6}
    )
    assert keys == {
        "perf/ttft_ms": 1,
        "eval/accuracy": 2,
        "eval/tokens_kept": 3,
        "eval/by/split/small": 4,
        "perf/x": 5,
        "perf/kv_bytes": 6,
    }


class FakeRun:
    """A fake wandb run whose given method raises an error."""

    def __init__(self, folder: Path, failing_method: str = "") -> None:
        self.id, self.dir, self.failing_method = "fake", str(folder / "files"), failing_method
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.logged: list[Any] = []
        self.codes: list[int] = []

    def define_metric(self, *args: Any, **options: Any) -> None:
        self._fail_in("define_metric")

    def log(self, data: dict[str, Any]) -> None:
        self._fail_in("log")
        self.logged.append(data)

    def log_artifact(self, artifact: Any) -> None:
        self._fail_in("log_artifact")

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)
        self._fail_in("finish")

    def _fail_in(self, method: str) -> None:
        if self.failing_method == method:
            raise RuntimeError(f"{method} does\nnot work")


def install_fake_wandb(
    monkeypatch: pytest.MonkeyPatch, run: FakeRun, failing_modes: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Install a fake wandb module, and return the list of options that its `init` receives."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> FakeRun:
        calls.append(options)
        if options["mode"] in failing_modes:
            raise TimeoutError("no answer")
        return run

    def make_stub(*args: Any, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(add_file=lambda file: None)

    module = SimpleNamespace(
        init=init,
        Settings=SimpleNamespace,
        Image=make_stub,
        Table=make_stub,
        Artifact=make_stub,
        plot=SimpleNamespace(),
    )
    module.plot.scatter = make_stub
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def log_experiment(folder: Path, project: str | None = "proj") -> Tracker:
    """Log a record, an overlay, a Pareto plot and results, as an experiment does."""
    (folder / "config.yaml").write_text("seed: 0\n")
    with track_run(project, config=CONFIG, directory=folder) as tracker:
        tracker.log_record(RECORD)
        tracker.log_overlay("one", make_selection())
        tracker.log_pareto([{"name": "a", "kept": 1, "score": 1.0}])
        tracker.finish({"accuracy": 1.0}, [folder / "config.yaml"])
        tracker.finish()
    return tracker


def list_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("method", ["define_metric", "log", "log_artifact", "finish"])
def test_a_failure_is_one_warning(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    run = FakeRun(tmp_path, method)
    install_fake_wandb(monkeypatch, run)
    assert not log_experiment(tmp_path).active
    assert list_warnings(caplog) == [
        f"W&B failed, so the run continues without it: RuntimeError: {method} does not work"
    ]
    assert run.codes[-1] == 1


def test_a_failed_start_of_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = install_fake_wandb(monkeypatch, FakeRun(tmp_path), failing_modes=("offline", "online"))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    log_experiment(tmp_path)
    assert [call["mode"] for call in calls] == ["online", "offline"]
    assert list_warnings(caplog) == ["W&B failed, so the run continues without it: TimeoutError: no answer"]


def test_a_missing_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    log_experiment(tmp_path)
    (warning,) = list_warnings(caplog)
    assert "continues without it" in warning
    assert "pip install wandb" in warning


def test_a_server_timeout_gives_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun(tmp_path)
    install_fake_wandb(monkeypatch, run, failing_modes=("online",))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    log_experiment(tmp_path)
    (warning,) = list_warnings(caplog)
    assert "offline (TimeoutError: no answer)" in warning
    assert f"wandb sync {tmp_path}" in warning
    assert any("eval/accuracy" in row for row in run.logged)
    assert run.codes == [0]


def test_an_interrupted_run_is_marked_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path)
    install_fake_wandb(monkeypatch, run)
    with pytest.raises(KeyboardInterrupt), track_run("proj", directory=tmp_path):
        raise KeyboardInterrupt
    assert run.codes == [1]


def test_the_mode_is_set_by_the_user_or_by_the_api_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine elsewhere.org login user password x\n")
    assert tracking.wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert tracking.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert tracking.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert tracking.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.wandb_mode() == "offline"


def test_wandb_is_not_used_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path)
    calls = install_fake_wandb(monkeypatch, run)
    log_experiment(tmp_path, None)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log_experiment(tmp_path)
    assert not calls
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")  # the agent sets the project
    log_experiment(tmp_path, None)
    assert len(calls) == 1


def test_sweep_parameters_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path)
    run.config["reducer"] = "HiRED"
    install_fake_wandb(monkeypatch, run)
    log_experiment(tmp_path)
    assert run.config == {"reducer": "HiRED", "resolved.reducer": CONFIG["reducer"], "seed": 0}


def test_overlays_require_pixels_and_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun(tmp_path)
    install_fake_wandb(monkeypatch, run)
    monkeypatch.setattr(tracking, "MAX_IMAGES", 2)
    selection = make_selection()
    with track_run("proj", directory=tmp_path) as tracker:
        tracker.log_overlay("none", Selection(selection.geometry, selection.kept, selection.asked))
        for name in "abcd":
            tracker.log_overlay(name, selection)
        assert tracker.active
    assert [key for row in run.logged for key in row] == ["vis/selection/a", "vis/selection/b"]
    assert sum("first 2 images" in warning for warning in list_warnings(caplog)) == 1


def test_missing_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install_fake_wandb(monkeypatch, FakeRun(tmp_path))
    with track_run("proj", directory=tmp_path) as tracker:
        tracker.finish({}, [tmp_path / "none.yaml"])
    assert any("none.yaml does not exist" in warning for warning in list_warnings(caplog))


def test_wandb_is_imported_lazily() -> None:
    code = "import sys; import tokenprune.experiments.tracking.tracker; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
