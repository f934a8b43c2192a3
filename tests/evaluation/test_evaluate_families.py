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
from tokenprune.strategies import HiRED, UniformStride
from tokenprune.testing.families.mllama import FAMILY as MLLAMA

MODELS = {"mllama": MLLAMA, "phi4_multimodal": FAMILIES["phi4_multimodal"], "qwen2_vl": FAMILIES["qwen2_vl"]}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_sample_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, batch_size: int) -> None:
    family: Any = MODELS[name]
    model, processor = family.model(), family.processor()
    processor.chat_template = (
        "{% for m in messages %}USER: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + family.image + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor.tokenizer.chat_template = processor.chat_template
    model.save_pretrained(tmp_path / "model")
    # The processors of some families cannot be loaded from a folder by transformers 5.24.
    monkeypatch.setattr(experiment, "load", lambda *_: (model, processor))
    base = Experiment(str(tmp_path / "model"), task=Boards(1), max_new_tokens=2, batch_size=batch_size)
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
