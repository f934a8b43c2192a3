"""Errors of the command line are one line."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.helpers.cli import FAST, STRATEGY_SOURCE, run_refused
from tokenprune.budget import NoTokenWarning
from tokenprune.cli.main import main
from tokenprune.cli.status import hide_transformers_warnings, print_short_warnings, show_status

USER_SOURCE = """
class Unrelated: ...

from dataclasses import dataclass
from tokenprune import AllocationPolicy, ScoreReducer
@dataclass
class Equal(AllocationPolicy):
    def allocate(self, image, total, capacity, scores): return [total // 0]



@dataclass
class Unfinished(ScoreReducer):
    def scores(self, image): ...

@dataclass
class TextNeeds(ScoreReducer):
    needs = "cls_attention"
    def score(self, image): ...
"""
"""Mistakes of a user in a file with strategies and components."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "no command 'frobnicate'; the commands are run, demo, evaluate, ablate, report, sweep"),
        (["list", "things"], "'strategies', 'components', 'models'"),
        (["run", "--reducr", "HiRED"], "no option --reducr (did you mean --reducer?)"),
        (["run", "--strategy", "HiRED"], "no option --strategy (did you mean --reducer?)"),
        (["evaluate", "--strategy.budget", "1"], "no option --strategy.budget (did you mean --reducer.budget?)"),
        (["bench", "run", "--strategy", "x"], "no option --strategy (did you mean --reducers?)"),
        (["run", "--prompt", "Where?"], "no option --prompt (did you mean --question?)"),
        (["list", "models", "--budget", "1"], "no option --budget\n"),
        (
            ["ablate", "x.yaml", "--budget", "0.2"],
            "--budget is no option of ablate; set reducer.budget in the YAML file",
        ),
        (["run", "photo.jpg"], "unexpected argument 'photo.jpg' (did you mean --image photo.jpg?)"),
        (["run", "run.yaml"], "unexpected argument 'run.yaml' (did you mean --config run.yaml?)"),
        (["sweep", "none.yaml"], "none.yaml"),
        (["run", "--reducer", "HiRD"], "no strategy is called 'HiRD'. Did you mean HiRED?"),
        (["run", "--reducer", "HiRED.papr"], "HiRED has no preset 'papr'; it has: paper, release"),
        (["run", "--reducer.budgt", "3"], "no parameter 'budgt' of HiRED (did you mean budget?)"),
        (
            ["run", "--reducer.selection.layr", "3"],
            "--reducer.selection: there is no parameter 'layr' of TopAttentionSelection",
        ),
        (["run", "--reducer.selection", "RandomSelecton"], "Did you mean RandomSelection"),
        (
            ["run", "--reducer.allocation", "TopAttentionSelection"],
            "does not correspond to a subclass of AllocationPolicy",
        ),
        (["run", "--reducer.budget", "1.5"], "neither a ratio nor a count"),
        (["run", "--reducer.budget", "-3"], "neither a ratio nor a count"),
        (["run", "--reducer.positions", "x"], "--reducer.positions: 'x' is not valid; give 'reindex' or 'preserve'"),
        (
            ["run", "--reducer.budget", "abc"],
            "budget 'abc' is neither a ratio nor a count; write a float from 0.0 to 1.0 or a percentage",
        ),
        (["run", "--reducer.selection.layer", "frst"], "'frst' is not valid; give 'first' or 'feature' or a whole"),
        (["run", "--max-new-tokens", "x"], "--max-new-tokens: 'x' is not valid; give a whole number"),
        (["run", "--question", " "], "--question ' ': give a text"),
        (["run", "--question", "<image> what?"], "the placeholder is added automatically"),
        (["run", "--reducer.selection.layer", "99"], "layer 99 is no layer of a vision tower with 5 layers"),
        (["run", "--reducer.selection.heads", "9"], "no head of a vision tower with 4 heads"),
        (["run", "--reducer", "none.py:X"], "none.py is not a Python file"),
        (["run", "--reducer", "broken.py:X"], "broken.py cannot be imported: ModuleNotFoundError"),
        (["run", "--reducer", "loud.py:Quiet"], "loud.py has no class 'Quiet'; it has LoudestTokens"),
        (["check", "loud.py"], "loud.py is a file; name its class: loud.py:LoudestTokens"),
        (
            ["check", "empty.py"],
            "empty.py has no strategy and no component; write a class, and name it as empty.py:Class",
        ),
        (["check", "user.py:Unfinished"], "Unfinished does not define score; rename scores to score (user.py:12)"),
        (["run", "--plugin", "user.py", "--reducer", "Unfinished"], "Unfinished does not define score; rename scores"),
        (["check", "user.py:Equal"], "Equal is a component (allocation), not a strategy (user.py:6); use it inside"),
        (["check", "TopNormSelection"], "a component (selection), not a strategy; use it inside a strategy: --reducer"),
        (["check", "user.py:Unrelated"], "Unrelated is no subclass of TokenReducer (user.py:2)"),
        (["run", "--reducer.allocation", "user.py:Unfinished"], "Unfinished is no subclass of Component (user.py:12)"),
        (["run", *FAST, "--reducer.allocation", "user.py:Equal"], "user.py:8: integer division or modulo by zero"),
        (["check", "user.py:TextNeeds"], "TextNeeds.needs must be a sequence of signals, such as (Signal("),
        (["run", "--config", "none.yaml"], "File does not exist"),
        (["run", "--reducer.attention", "pooled"], "attention takes auto, cls, pooling, received or a component; no"),
        (
            ["run", "--reducer.attention", "TimmSaliency", "--reducer.attention.model", "x"],
            "there is no parameter 'model' of TimmSaliency (did you mean model_name?)",
        ),
        (["run", "--image", "none.png"], "none.png: no such file"),
        (["run", "--image", "loud.py"], "loud.py: not an image"),
        (
            ["run", "--model", "./nothing"],
            "./nothing: no such folder; give `mini`, `mini-pages`, a checkpoint folder, or a hub id",
        ),
        (["run", "--model", "."], "--model . cannot be loaded"),
        (["run", "--out", "loud.py"], "--out loud.py cannot be created as a folder"),
        (["run", "--device", "cuda:77"], "--device cuda:77 cannot be used"),
        (["run", "--dtype", "int9"], "--dtype int9 is no torch dtype"),
        (["run", "--max-new-tokens", "0"], "must be at least 1"),
        (["run", "--figure", "kept.gif"], "--figure kept.gif: give a file that ends in .png, .pdf, .svg"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_error_is_one_line(
    capsys: pytest.CaptureFixture[str], strategy_file: Path, arguments: list[str], message: str
) -> None:
    Path("broken.py").write_text("import nothing_like_this")
    Path("empty.py").write_text("")
    Path("user.py").write_text(USER_SOURCE)
    assert message in run_refused(capsys, *arguments)


def test_an_error_before_the_first_record_leaves_no_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml" in run_refused(capsys, "ablate", "none.yaml")


def test_status_is_shown_in_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda value=is_terminal: value)
        with show_status("checking") as show_step:
            show_step("exact budget")
        out, err = capsys.readouterr()
        assert out == ""
        assert ("checking" in err) == is_terminal


def test_warnings_of_transformers_are_hidden_inside_the_block_only() -> None:
    logger = logging.getLogger("transformers")
    level = logger.level
    with hide_transformers_warnings():
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    assert logger.level == level


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match=r"none\.png"):
        main(["run", "--debug", "--image", "none.png"])


def test_an_error_of_a_strategy_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.py").write_text(
        STRATEGY_SOURCE.replace("return image.features.float().norm(dim=-1) ** self.power", "return 1 / 0")
    )
    assert "division by zero (ZeroDivisionError; --debug shows where)" in run_refused(
        capsys, "run", *FAST, "--reducer", "bad.py:LoudestTokens"
    )


def test_an_unsupported_model_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune import adapter

    monkeypatch.setattr(adapter, "adapters", dict)
    monkeypatch.setattr(adapter, "list_subclasses", lambda base: [])
    assert "no adapter supports LlavaNextForConditionalGeneration" in run_refused(capsys, "run", *FAST)


def test_several_errors_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("grid: {reducer.budget: [1.5, few]}")
    assert main(["ablate", "bad.yaml", "--dry-run"]) == 2
    heading, first, second = capsys.readouterr().err.splitlines()
    assert heading == "tokenprune: 2 settings of the grid are not valid:"
    assert first.startswith("  budget=1.5: ")
    assert second.startswith("  budget=few: ")


def test_a_setting_without_factors_is_named_by_its_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    Path("single.yaml").write_text("reducer: HiRED\nbaselines: false\n")
    assert main(["ablate", "single.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("  grid      HiRED\n1 setting\n")


def test_an_unwritable_overlay_does_not_discard_the_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def fail(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    for option in ([], ["--json"]):
        assert main(["run", *FAST, *option]) == 2
        out, err = capsys.readouterr()
        assert err == "tokenprune: tokenprune-out/overlay.png cannot be written: No space left on device\n"
        assert "What number is on the green square?" in out
        assert "overlay: " not in out
        assert list(Path("tokenprune-out").iterdir()) == []
    assert json.loads(out)["overlay"] is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "runs/a"), "runs/a: No space left on device; free space, then run"),
        (
            OSError(30, "Read-only file system", "runs"),
            "runs: Read-only file system; choose a folder",
        ),
        (OSError(5, "Input/output error"), "tokenprune: Input/output error"),
        (OSError("other"), "tokenprune: other"),
    ],
)
def test_errors_of_the_file_system_have_no_bare_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    monkeypatch.setattr("tokenprune.cli.report.run", Mock(side_effect=error))
    text = run_refused(capsys, "report", "runs")
    assert message in text
    assert "Errno" not in text


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    """The signal is sent during generation."""
    command = [sys.executable, "-m", "tokenprune", "run", "--repeats", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    # If a shell runs the tests in the background, it ignores SIGINT, and child processes inherit this setting.
    restore_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process: Any = subprocess.Popen(command, preexec_fn=restore_sigint, **pipes)  # type: ignore[call-overload]
    while not (tmp_path / "tokenprune-out").exists():  # is created after the images are read
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "tokenprune: stopped"
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("address", ["https://example.com/a.png", "HTTP://example.com/a.png"])
def test_urls_are_not_downloaded(capsys: pytest.CaptureFixture[str], tmp_path: Path, address: str) -> None:
    assert main(["run", "--image", address, "--question", "x", "--out", str(tmp_path)]) == 2
    assert f"{address} is a URL, and URLs are not downloaded; download the image" in capsys.readouterr().err
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"image": address, "question": "x", "answer": "y"}) + "\n")
    arguments = [
        "evaluate",
        "--task",
        "folder",
        "--task.path",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--quiet",
        "true",
    ]
    assert main(arguments) == 2
    assert f"line 1: {address} is a URL" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["ftp://example.com/a.png", "s3://bucket/a.png"])
def test_urls_of_data_sets_and_other_schemes_are_not_downloaded(
    capsys: pytest.CaptureFixture[str], address: str
) -> None:
    assert f"{address} is a URL" in run_refused(capsys, "run", "--image", address)
    message = run_refused(capsys, "evaluate", "--task", "folder", "--task.path", address, "--quiet")
    assert f"{address} is a URL, and URLs are not downloaded; download the data set" in message


def test_warnings_are_one_line_in_the_form_of_errors() -> None:
    original = warnings.formatwarning
    with print_short_warnings():
        assert warnings.formatwarning("no token", NoTokenWarning, "pipeline.py", 564) == "tokenprune: no token\n"
        assert warnings.formatwarning("no token", NoTokenWarning, "pipeline.py", 564) == ""
        assert "UserWarning" in warnings.formatwarning("of a library", UserWarning, "other.py", 3)
    assert warnings.formatwarning is original


def test_the_command_line_prints_a_warning_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tokenprune", "run", *FAST, "--budget", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    lines = [line for line in result.stderr.splitlines() if "grants no visual token" in line]
    assert len(lines) == 1
    assert lines[0].startswith("tokenprune: the budget of HiRED")
