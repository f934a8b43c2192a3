"""Images and kept tokens in run directories: their limits, and restoring a selection from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.helpers.small_grid import SMALL, records, remove_times, start
from tokenprune.cli.main import main
from tokenprune.decoder_reducer import AtLayer
from tokenprune.experiments.analysis.report import write_report
from tokenprune.experiments.evaluation.experiment import Experiment, Setting, run_settings
from tokenprune.experiments.evaluation.stored_images import (
    PIXELS,
    SIDE,
    cuts_from_record,
    is_stored,
    pack_mask,
    selection_from_record,
    store_image,
    unpack_mask,
)
from tokenprune.experiments.evaluation.tasks import Boards
from tokenprune.strategies import HiRED, ImageDownsample, SpatialPooling, UniformStride
from tokenprune.viz import overlay

pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.mark.parametrize(("total", "limit"), [(10, 3), (7, 7), (3, 200), (1000, 1), (5, 0)])
def test_stored_images_are_evenly_spaced_up_to_the_limit(total: int, limit: int) -> None:
    stored = [number for number in range(total) if is_stored(number, total, limit)]
    assert len(stored) == min(total, limit)
    gaps = np.diff(stored)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_a_mask_is_unpacked_as_it_was_packed() -> None:
    mask = torch.rand(5, 577, generator=torch.Generator().manual_seed(0)) < 0.2
    assert torch.equal(unpack_mask(pack_mask(mask), (5, 577)), mask)
    assert len(pack_mask(mask)) < 600


def test_a_stored_image_has_a_size_limit() -> None:
    pixels = torch.randint(0, 256, (37, 384, 384, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    name = store_image(Path(), "images/a", pixels)
    with Image.open(name) as image:
        assert image.width <= SIDE
        assert image.width * image.height <= PIXELS
        assert image.height % 37 == 0
    assert name.endswith(".jpg")
    before = Path(name).stat().st_mtime_ns
    assert store_image(Path(), "images/a", pixels) == name  # the settings of a run share the file
    assert Path(name).stat().st_mtime_ns == before
    assert [file.name for file in Path("images").iterdir()] == ["a.jpg"]


def test_a_selection_is_restored_from_records_and_images() -> None:
    """The restored overlay equals the overlay of the run, for every kind of strategy."""
    selections: dict[str, Any] = {}

    def on_record(setting: Setting, record: object, selection: object) -> None:
        selections.setdefault(setting.name, selection)

    task = Boards(number=1)
    reducers = (HiRED(0.1), SpatialPooling(0.2), ImageDownsample(0.2), UniformStride(1.0))
    settings = [
        Setting(Experiment(reducer=reducer, task=task, max_new_tokens=4, batch_size=32), type(reducer).__name__)
        for reducer in reducers
    ]
    run_settings(settings, Path("out"), on_record=on_record)
    for setting in settings:
        record, *_ = records("out")[setting.experiment.hash()]
        restored, original = selection_from_record(Path("out"), record), selections[setting.name]
        assert restored is not None
        assert restored.overlay().tobytes() == original.overlay().tobytes()
    assert len(list(Path("out/images").iterdir())) == 1


def test_cuts_are_restored_from_records() -> None:
    reducer = HiRED(0.4) >> AtLayer(1, UniformStride(0.5))
    setting = Setting(Experiment(reducer=reducer, task=Boards(number=1), max_new_tokens=1, batch_size=32), "composed")
    run_settings([setting], Path("out"))
    record, *_ = next(iter(records("out").values()))
    restored = selection_from_record(Path("out"), record)
    assert restored is not None
    ((layer, cut),) = cuts_from_record(record, restored).items()
    assert (layer, cut.asked, cut.kept_tokens) == (1, record["kept"] // 2, record["kept"] // 2)
    assert torch.equal(cut.geometry.valid, restored.kept)
    assert bool((restored.kept | ~cut.kept).all())
    assert overlay(restored, cuts={layer: cut}).height > overlay(restored).height


def test_images_can_be_omitted_and_a_resumed_run_can_store_them() -> None:
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


@pytest.mark.slow
def test_workers_store_the_same_images_as_a_single_process() -> None:
    Path("small.yaml").write_text(yaml.safe_dump({**SMALL, "baselines": False}))
    assert main(["ablate", "small.yaml", "--out", "one", "--images", "1", "--quiet"]) == 0
    assert start("small.yaml", "--out", "two", "--images", "1", "--workers", "2").wait() == 0
    assert remove_times(records("one")) == remove_times(records("two"))
    files = [sorted((file.name, file.read_bytes()) for file in Path(out, "images").iterdir()) for out in ("one", "two")]
    assert files[0] == files[1]
    assert len(files[0]) == 1
