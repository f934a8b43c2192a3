"""PiToMe equals recorded cases of the official code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenprune.strategies.encoder.pitome import match_energy

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "pitome.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN})


@pytest.mark.parametrize("case", CASES)
def test_groups_equal_the_official_code(case: str) -> None:
    metric = torch.tensor(GOLDEN[f"{case}/metric"]).float()[None]
    patches, ratio = metric.shape[1], float(GOLDEN[f"{case}/ratio"])
    groups = match_energy(metric, math.floor(patches - patches * ratio), float(GOLDEN[f"{case}/margin"]))
    assert groups.group is not None
    assert groups.kept.shape[1] == int(GOLDEN[f"{case}/kept_number"])
    assert groups.group[0].tolist() == GOLDEN[f"{case}/group"].tolist()
