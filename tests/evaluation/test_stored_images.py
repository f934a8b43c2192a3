"""Images and kept tokens of run directories: bounded, whole, and enough to draw a selection again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.helpers.small_grid import SMALL, records, start, without_times
from tokenprune.experiments.analysis.report import write_report
from tokenprune.experiments.evaluation.experiment import Experiment, Setting, run_settings
from tokenprune.experiments.evaluation.stored_images import PIXELS, SIDE, from_record, is_stored, pack, store, unpack
from tokenprune.experiments.evaluation.tasks import Boards
from tokenprune.strategies import HiRED, ImageDownsample, SpatialPooling, UniformStride


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("total", "most"), [(10, 3), (7, 7), (3, 200), (1000, 1), (5, 0)])
def test_as_many_are_stored_as_said_and_evenly(total: int, most: int) -> None:
    chosen = [number for number in range(total) if is_stored(number, total, most)]
    assert len(chosen) == min(total, most)
    gaps = np.diff(chosen)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_a_mask_is_what_was_packed() -> None:
    mask = torch.rand(5, 577, generator=torch.Generator().manual_seed(0)) < 0.2
    assert torch.equal(unpack(pack(mask), (5, 577)), mask)
    assert len(pack(mask)) < 600


def test_a_stored_image_has_a_bound() -> None:
    pixels = torch.randint(0, 256, (37, 384, 384, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    name = store(Path(), "images/a", pixels)
    with Image.open(name) as image:
        assert image.width <= SIDE
        assert image.width * image.height <= PIXELS
        assert image.height % 37 == 0
    assert name.endswith(".jpg")
    before = Path(name).stat().st_mtime_ns
    assert store(Path(), "images/a", pixels) == name  # the settings of a run share it
    assert Path(name).stat().st_mtime_ns == before
    assert [file.name for file in Path("images").iterdir()] == ["a.jpg"]


def test_a_selection_is_drawn_again_from_the_records_alone() -> None:
    """As the one that ran drew itself, for every kind of strategy."""
    drawn: dict[str, Any] = {}

    def watch(setting: Setting, record: object, selection: object) -> None:
        drawn.setdefault(setting.name, selection)

    task = Boards(number=1)
    reducers = (HiRED(0.1), SpatialPooling(0.2), ImageDownsample(0.2), UniformStride(1.0))
    settings = [
        Setting(Experiment(reducer=r, task=task, max_new_tokens=4, batch_size=32), type(r).__name__) for r in reducers
    ]
    run_settings(settings, Path("out"), watch=watch)
    for setting in settings:
        record, *_ = records("out")[setting.experiment.hash()]
        again, before = from_record(Path("out"), record), drawn[setting.name]
        assert again is not None
        assert again.overlay().tobytes() == before.overlay().tobytes()
    assert len(list(Path("out/images").iterdir())) == 1


def test_images_are_left_out_on_demand_and_a_resumed_run_may_change_its_mind() -> None:
    setting = Setting(Experiment(reducer=HiRED(0.1), task=Boards(number=2), max_new_tokens=4, batch_size=32), "HiRED")
    run_settings([setting], Path("out"), images=0)
    assert not Path("out/images").exists()
    (rows,) = records("out").values()
    assert {(row["stored_image"], row["selection"]) for row in rows} == {(None, None)}
    file = setting.folder(Path("out")) / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-2]))
    run_settings([setting], Path("out"), images=2)
    (rows,) = records("out").values()
    assert [row["stored_image"] is not None for row in rows[-3:]] == [False, True, True]
    assert write_report(Path("out"))


def test_workers_store_what_one_process_stores() -> None:
    Path("small.yaml").write_text(yaml.safe_dump({**SMALL, "baselines": False}))
    assert start("small.yaml", "--out", "one", "--images", "1").wait() == 0
    assert start("small.yaml", "--out", "two", "--images", "1", "--workers", "2").wait() == 0
    assert without_times(records("one")) == without_times(records("two"))
    files = [sorted((f.name, f.read_bytes()) for f in Path(out, "images").iterdir()) for out in ("one", "two")]
    assert files[0] == files[1]
    assert len(files[0]) == 1
