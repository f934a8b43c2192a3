"""Functions that run the command line, and a strategy in a file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tokenprune.cli.main import main

FAST = ["--repeats", "1", "--max-new-tokens", "3"]
SOME_FAMILIES = ["--families", "llava_next", "qwen2_5_vl"]
STRATEGY_SOURCE = '''
from dataclasses import dataclass
from torch import Tensor
from tokenprune import EncodedImage, ScoreReducer


@dataclass
class LoudestTokens(ScoreReducer):
    """Keep the tokens with the largest feature norm."""

    power: float = 1.0

    def score(self, image: EncodedImage) -> Tensor:
        return image.features.float().norm(dim=-1) ** self.power

    @classmethod
    def quiet(cls) -> "LoudestTokens":
        return cls(power=-1.0)
'''


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run `tokenprune run ... --json` in this process, and return the object on stdout."""
    exit_code = main(["run", *FAST, "--json", *arguments])
    out, err = capsys.readouterr()
    assert exit_code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


def run_refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail, and return its error message of one line."""
    exit_code = main(list(arguments))
    out, err = capsys.readouterr()
    assert exit_code == 2
    assert out == ""
    assert err.startswith("tokenprune: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err
