"""`evaluate` runs model families whose forward pass a strategy patches: the patch stays active during generation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.families import FAMILIES
from tokenprune.experiments.evaluation import experiment
from tokenprune.experiments.evaluation.experiment import Experiment, Setting, run_settings
from tokenprune.experiments.evaluation.tasks import Boards
from tokenprune.strategies import HiRED, PixelPrune, RandomPatches, UniformStride
from tokenprune.testing.families.mllama import FAMILY as MLLAMA

MODELS = {"mllama": MLLAMA, "phi4_multimodal": FAMILIES["phi4_multimodal"], "qwen2_vl": FAMILIES["qwen2_vl"]}


def save_model(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Save a tiny model whose processor has a chat template, and return its folder."""
    family: Any = MODELS[name]
    model, processor = family.model(), family.processor()
    processor.chat_template = (
        "{% for m in messages %}USER: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + family.image + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor.tokenizer.chat_template = processor.chat_template
    model.save_pretrained(folder)
    # The processors of some families cannot be loaded from a folder by transformers 5.24.
    monkeypatch.setattr(experiment, "load", lambda *_: (model, processor))
    return str(folder)


def test_strategies_before_the_tower_encode_an_image_once_per_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All batches of questions about an image, and settings with equal masks, share an encoding.

    If all patches remain, the encoding of the other settings is used.
    """
    folder = save_model("qwen2_vl", tmp_path / "model", monkeypatch)
    base = Experiment(folder, task=Boards(1), max_new_tokens=1, batch_size=1)
    reducers = (PixelPrune(3), PixelPrune(3) >> HiRED(1), PixelPrune(2), RandomPatches(1.0))
    settings = [Setting(replace(base, reducer=reducer), repr(reducer)) for reducer in reducers]
    progress = run_settings(settings, tmp_path / "out")
    assert (progress.errors, progress.images, progress.encodes) == (0, 1, 1)
    assert progress.more_encodes == 2


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_sample_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, batch_size: int) -> None:
    folder = save_model(name, tmp_path / "model", monkeypatch)
    base = Experiment(folder, task=Boards(1), max_new_tokens=2, batch_size=batch_size)
    reducers = (UniformStride(1.0), HiRED(0.2), HiRED(0.5))
    settings = [Setting(replace(base, reducer=reducer), repr(reducer)) for reducer in reducers]
    progress = run_settings(settings, tmp_path / "out")
    kept = []
    for setting in settings:
        lines = (setting.folder(tmp_path / "out") / "records.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["error"] for record in records] == [None] * len(records)
        kept.append(records[0]["kept"])
    assert progress.errors == 0
    assert progress.images == 1
    assert kept[0] > kept[2] > kept[1] > 0
