"""The recorded cases of official implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


class Case:
    """One recorded case of a method, arrays by name, floats as float32."""

    def __init__(self, method: str, number: int) -> None:
        self.arrays = np.load(Path(__file__).parents[1] / "golden" / f"{method}.npz")
        self.prefix = f"case{number:02d}/"

    def __getitem__(self, name: str) -> Any:
        value = self.arrays[self.prefix + name]
        value = value.astype(np.float32) if value.dtype == np.float16 else value
        return torch.from_numpy(value) if value.ndim else value.item()


CASES = range(6)
