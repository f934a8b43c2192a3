"""The commands `list`, `bench` and `check`, and the help."""

from __future__ import annotations

import gc
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers.cli import SOME_FAMILIES, STRATEGY_SOURCE, run_refused
from tokenprune import __version__
from tokenprune.cli.help import help_file
from tokenprune.cli.help.__main__ import SUBCOMMANDS, format_help
from tokenprune.cli.main import COMMANDS, main
from tokenprune.experiments.bench import selection_cost
from tokenprune.experiments.bench.selection_cost import ModelSize


def test_a_second_command_does_not_freeze_the_garbage_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models"]) == 0
    frozen = gc.get_freeze_count()
    assert frozen
    assert main(["list", "models"]) == 0
    assert gc.get_freeze_count() <= frozen


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for kind in ("strategies", "components", "models"):
        assert main(["list", kind]) == 0
        compact = capsys.readouterr().out.splitlines()
        assert main(["list", kind, "--details"]) == 0
        details = capsys.readouterr().out
        assert main(["list", kind, "--json"]) == 0
        rows[kind] = json.loads(capsys.readouterr().out)
        assert [line.split()[0] for line in compact[1:]] == [next(iter(row.values())) for row in rows[kind]]
        assert len(details.splitlines()) > 3 * len(rows[kind])
    hired = next(row for row in rows["strategies"] if row["name"] == "HiRED")
    assert hired["presets"] == "HiRED.paper, HiRED.release"
    assert hired["needs"] == "cls_attention(feature), cls_attention(first)"
    kinds = {row["name"]: row["kind"] for row in rows["components"]}
    assert kinds["TopAttentionSelection"] == "selection"
    assert kinds["VisualContentAllocation"] == "allocation"
    imports = {row["name"]: row["import"] for row in rows["components"]}
    assert imports["GuidedAllocation"] == "from tokenprune.strategies.components import GuidedAllocation"
    assert {"internvl", "llava", "llava_next", "qwen2_vl"} <= {row["family"] for row in rows["models"]}


def test_list_of_plugins_and_as_markdown(capsys: pytest.CaptureFixture[str], strategy_file: Path) -> None:
    assert main(["list", "strategies", "--plugin", "loud.py", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["LoudestTokens"]["needs"] == "features"
    Path("own.py").write_text(
        "from tokenprune.strategies.components import StrideSelection\nclass Own(StrideSelection): ..."
    )
    assert main(["list", "components", "--plugin", "own.py", "--json"]) == 0
    own = next(row for row in json.loads(capsys.readouterr().out) if row["name"] == "Own")
    assert own["import"] == f"{Path('own.py').resolve()}:Own"
    assert rows["HiRED"]["parity"] == "release(): 12/12 official cases"
    assert rows["VisionZip"]["dropped tokens"] == "merged"
    stages = [row["stage"] for row in rows.values()]
    assert stages == sorted(stages, key=["image", "encoder", "projector", "decoder", "several"].index)
    assert rows["ImageDownsample"]["stage"] == "image"
    assert rows["AtLayer"]["stage"] == "decoder"
    assert rows["AtLayer"]["parameters"] == "positions='preserve', layer, reducer"
    assert rows["Composed"]["stage"] == "several"
    assert rows["Composed"]["needs"] == "depends on its parameters"
    assert main(["list", "strategies", "--markdown"]) == 0
    assert "| `HiRED` |" in capsys.readouterr().out
    Path("twice.py").write_text(STRATEGY_SOURCE.replace("LoudestTokens", "HiRED"))
    message = run_refused(capsys, "list", "strategies", "--plugin", "twice.py")
    assert "two classes are called HiRED" in message
    assert "two classes are called HiRED" in run_refused(capsys, "run", "--reducer", "twice.py:HiRED")
    assert "nowhere.py is not a Python file" in run_refused(capsys, "list", "strategies", "--plugin", "nowhere.py")


def test_bench(capsys: pytest.CaptureFixture[str], strategy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ModelSize(side=3, patch=4, layers=4, heads=2, width=8, intermediate=8, shared=4, dim=8)
    monkeypatch.setattr(selection_cost, "ModelSize", lambda: tiny)
    arguments = ["--names", "hired", "LoudestTokens", "--plugin", "loud.py", "--repeats", "1", "--threads", "1"]
    assert main(["bench", "strategies", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Vision encode:")
    assert "| HiRED |" in out
    assert "| LoudestTokens |" in out
    assert "Did you mean HiRED" in run_refused(capsys, "bench", "strategies", "--names", "hird")
    assert "no option --repeat (did you mean --repeats?)" in run_refused(capsys, "bench", "strategies", "--repeat", "1")
    assert "name the benchmark before its options: tokenprune bench run" in run_refused(
        capsys, "bench", "--repeats", "1"
    )


def test_check(capsys: pytest.CaptureFixture[str], strategy_file: Path) -> None:
    assert main(["check", "hired", *SOME_FAMILIES, "--reducer.budget", "0.1"]) == 0
    assert "HiRED meets the contract" in capsys.readouterr().out
    assert main(["check", "loud.py:LoudestTokens", *SOME_FAMILIES, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    Path("bad.py").write_text(STRATEGY_SOURCE.replace("image.features.float()", "image.features.mul_(2).float()"))
    assert main(["check", "bad.py:LoudestTokens", *SOME_FAMILIES]) == 1
    out = capsys.readouterr().out
    assert "FAIL inputs unchanged: reduced one tile: expected an unchanged image, got changed features" in out
    assert "LoudestTokens breaks the contract" in out
    assert "name the strategy" in run_refused(capsys, "check")
    assert "no strategy is called 'Hird'. Did you mean HiRED?" in run_refused(capsys, "check", "Hird")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"tokenprune {__version__}",
        *(f"{package} {version(package)}" for package in ("torch", "transformers")),
        f"Python {platform.python_version()}",
    ]
    assert main(["--help"]) == 0
    assert "run" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["run", "--help"]) == 0
    assert "--reducer" in capsys.readouterr().out


def test_check_on_some_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "HiRED", "--families", "llava_next"]) == 0
    assert "HiRED" in capsys.readouterr().out
    assert main(["check", "HiRED", "--families", "lava"]) == 2
    assert "no family is called lava" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS if name != "bench"), *SUBCOMMANDS], ids=" ".join)
def test_the_stored_help_is_the_help_of_the_parser(command: list[str]) -> None:
    """The texts around the options depend on the versions of Python and jsonargparse."""

    def split_options(text: str) -> dict[str, str]:
        blocks = re.split(r"\n  (?=--[\w-]+)", text.partition("options:")[2])[1:]
        return {block.split()[0]: " ".join(block.split()) for block in blocks}

    stored, current = split_options(help_file(command).read_text()), split_options(format_help(command))
    assert stored.keys() == current.keys()
    own = {name for name in current if name != "--print_config" and not name.endswith(".help")}
    message = "run `python -m tokenprune.cli.help`"
    assert {name: stored[name] for name in own} == {name: current[name] for name in own}, message
    assert len(own) > 1


@pytest.mark.parametrize("command", [*COMMANDS, "bench run", "bench strategies"])
def test_the_help_prints_percent_signs_once(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: tokenprune")
    assert "%%" not in out
    has_budget = command in ("run", "evaluate", "encode", "check", "bench run", "bench strategies", "cost")
    assert ("20%" in out) == has_budget
    assert not has_budget or ("1 keeps one token" in " ".join(out.split()) and "--budget" in out)
    assert out.startswith(f"usage: tokenprune {command}")
