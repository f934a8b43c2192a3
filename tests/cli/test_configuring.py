"""Strategies, components, budgets and layers on the command line and in YAML."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.cli import SOME_FAMILIES, STRATEGY_SOURCE, run_json, run_refused
from tokenprune.budget import OneTokenWarning
from tokenprune.catalog import strategies
from tokenprune.cli.main import main
from tokenprune.configuration import as_config
from tokenprune.strategies import PruMerge, VisionZip
from tokenprune.strategies.components import ContextualMerging, MeanOfRestMerging, SaliencyCoverageSelection


def component_config(report: dict[str, Any], name: str) -> Any:
    return report["reducer"]["init_args"][name]


def test_names_budgets_and_components(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--reducer.selection.seed", "3", "--reducer.selection", "random-selection", "--reducer", "hired"]
    report = run_json(capsys, *arguments, "--reducer.budget", "37", "--reducer.allocation=UniformAllocation")
    assert report["asked"] == report["kept"] == 37
    assert report["budgets"] == [8, 8, 7, 7, 7]
    assert component_config(report, "selection")["class_path"].endswith("RandomSelection")
    assert component_config(report, "selection")["init_args"] == {"seed": 3}


def test_a_parameter_without_its_class_keeps_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--reducer.selection.layer", "-2", "--reducer.allocation.base_share", "0.25")
    assert component_config(report, "selection")["init_args"] == {"layer": -2, "heads": "sum"}
    assert component_config(report, "allocation")["init_args"]["base_share"] == 0.25
    assert report["budgets"][0] == 25


def test_budgets_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("20%", "20 %", "0.2"):
        report = run_json(capsys, f"--reducer.budget={text}", "--max-new-tokens", "1")
        assert report["asked"] == report["kept"] == 100
        assert component_config(report, "budget") == 0.2
    Path("percent.yaml").write_text("reducer:\n  class_path: HiRED\n  init_args:\n    budget: 100%\n")
    assert component_config(run_json(capsys, "--config", "percent.yaml", "--max-new-tokens", "1"), "budget") == 1.0
    nested = run_json(capsys, "--reducer.budget.amount", "10%", "--reducer.budget.per", "tile", "--max-new-tokens", "1")
    assert component_config(nested, "budget") == {"amount": 0.1, "per": "tile", "of": "encoded", "newlines": "free"}


def test_a_budget_of_1_gives_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(OneTokenWarning, match="one token"):
        assert run_json(capsys, "--reducer.budget=1", "--max-new-tokens", "1")["kept"] == 1


def test_a_check_warns_only_of_the_passed_budget() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", OneTokenWarning)
        assert main(["check", "hired", *SOME_FAMILIES]) == 0
    with pytest.warns(OneTokenWarning, match="one token"):
        assert main(["check", "hired", *SOME_FAMILIES, "--reducer.budget=1"]) == 0


@pytest.mark.parametrize("budget", ["120%", "few", "0", "0%"])
def test_bench_refuses_invalid_ratios(capsys: pytest.CaptureFixture[str], budget: str) -> None:
    message = run_refused(capsys, "bench", "run", "--model", "mini", "--budgets", budget)
    assert f"--budgets {budget}: give ratios above 0 and up to 1, such as 0.2 or 20%" in message


@pytest.mark.parametrize("budget", ["120%", "2", "-0.1"])
def test_bench_of_strategies_refuses_invalid_ratios(capsys: pytest.CaptureFixture[str], budget: str) -> None:
    message = run_refused(capsys, "bench", "strategies", "--names", "HiRED", f"--budget={budget}")
    assert "is neither a ratio nor a count" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["--reducer.budget.amount", "9", "--reducer.budget.per", "tile"],
        ['--reducer.budget={"amount": 9, "per": "tile"}'],
    ],
)
def test_budgets_with_all_fields(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    report = run_json(capsys, *arguments)
    assert report["asked"] == 45
    assert component_config(report, "budget") == {"amount": 9, "per": "tile", "of": "encoded", "newlines": "free"}


def test_layers_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    for text, layer in {"first": "first", "0.5": 0.5, "[first, feature]": ["first", "feature"], "2": 2}.items():
        report = run_json(capsys, "--reducer.selection.layer", text)
        assert component_config(report, "selection")["init_args"]["layer"] == layer


def test_presets_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    release = run_json(capsys, "--reducer", "HiRED.release", "--reducer.budget", "0.3")
    assert component_config(release, "padding") == "ignore"
    assert component_config(release, "allocation")["init_args"]["region"] == "stripe"
    assert release["newlines"] == 0
    assert release["asked"] == 150
    paper = run_json(capsys, "--reducer=hired.paper")
    assert component_config(paper, "allocation")["init_args"]["region"] == "quadrant"


def test_a_strategy_from_a_file(capsys: pytest.CaptureFixture[str], strategy_file: Path) -> None:
    report = run_json(capsys, "--reducer", f"{strategy_file}:LoudestTokens", "--reducer.budget", "0.1")
    assert report["kept"] == 50
    quiet = run_json(capsys, "--reducer", "loud.py:LoudestTokens.quiet", "--reducer.budget", "0.1")
    assert component_config(quiet, "power") == -1.0
    assert quiet["kept_per_tile"] != report["kept_per_tile"]
    plugin = run_json(capsys, "--plugin", "loud.py", "--reducer", "loudest-tokens", "--reducer.budget", "0.1")
    assert plugin["kept_per_tile"] == report["kept_per_tile"]


@pytest.mark.parametrize("strategy", ["hired", "loud.py:LoudestTokens"])
def test_a_printed_config_can_be_run(capsys: pytest.CaptureFixture[str], strategy_file: Path, strategy: str) -> None:
    arguments = ["--reducer", strategy, "--reducer.budget", "0.15", "--reducer.positions", "preserve"]
    assert main(["run", *arguments, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["reducer"]["init_args"]["budget"] == 0.15
    Path("run.yaml").write_text(text)
    sys.modules.pop("tokenprune_plugin_loud", None)
    report = run_json(capsys, "--config", "run.yaml")
    assert report["asked"] == 75
    assert component_config(report, "positions") == "preserve"
    assert run_json(capsys, "--config", "run.yaml", "--reducer.budget", "0.2")["asked"] == 100


def test_yaml_accepts_the_names_of_the_command_line(capsys: pytest.CaptureFixture[str], strategy_file: Path) -> None:
    Path("short.yaml").write_text("reducer: hired.release\n")
    assert component_config(run_json(capsys, "--config", "short.yaml"), "padding") == "ignore"
    Path("long.yaml").write_text(
        "plugin: [loud.py]\nreducer:\n  class_path: HiRED.paper\n  init_args:\n    budget: 0.3\n"
        "    selection: {class_path: random-selection, init_args: {seed: 4}}\n"
    )
    report = run_json(capsys, "--config", "long.yaml")
    assert report["asked"] == 150
    assert component_config(report, "selection")["init_args"] == {"seed": 4}
    assert component_config(report, "allocation")["init_args"]["region"] == "quadrant"
    inline = run_json(capsys, "--reducer.selection={class_path: random-selection, init_args: {seed: 5}}")
    assert component_config(inline, "selection")["init_args"] == {"seed": 5}


def test_repeated_options_and_kebab_case_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--question", "One?", "--question", "Two?", "--reducer.allocation.base-share", "0.3")
    assert [result["question"] for result in report["results"]] == ["One?", "Two?"]
    assert component_config(report, "allocation")["init_args"]["base_share"] == 0.3


def test_output_of_a_strategy_is_not_part_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    Path("chatty.py").write_text(
        STRATEGY_SOURCE.replace("        return image", "        print('hello')\n        return image")
    )
    assert run_json(capsys, "--reducer", "chatty.py:LoudestTokens")["kept"] == 100


@pytest.mark.parametrize("name", sorted(strategies()))
def test_a_strategy_by_name_has_its_own_components(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """No component of HiRED, the default strategy, remains."""
    assert main(["run", "--reducer", name, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["reducer"]
    assert printed == as_config(strategies()[name]())  # type: ignore[call-arg]
    module = strategies()[name].__module__
    assert main(["run", "--reducer", f"{module}.{name}", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["reducer"] == printed


def test_a_component_by_name_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--reducer",
        "PruMerge",
        "--reducer.selection",
        "SaliencyCoverageSelection",
        "--reducer.merging",
        "mean-of-rest-merging",
    ]
    assert main(["run", *arguments, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["reducer"]
    assert printed == as_config(PruMerge(selection=SaliencyCoverageSelection(), merging=MeanOfRestMerging()))


def test_values_in_the_format_of_the_wandb_agent(capsys: pytest.CaptureFixture[str]) -> None:
    component = "{'class_path': 'ContextualMerging', 'init_args': {'number': None, 'cls': True}}"
    arguments = [
        "--reducer=VisionZip",
        f"--reducer.merging={component}",
        "--reducer.text_model=None",
        "--reducer.order=None",
    ]
    assert main(["run", *arguments, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["reducer"]
    assert printed == as_config(VisionZip(merging=ContextualMerging(cls=True)))


def test_nested_components_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--reducer",
        "CDPruner",
        "--reducer.text-model",
        "mini",
        "--reducer.selection.relevance",
        "text-relevance",
    ]
    report = run_json(capsys, *arguments, "--reducer.selection.relevance.sign", "aligned", "--reducer.budget", "0.1")
    assert component_config(report, "selection")["init_args"]["relevance"]["init_args"]["sign"] == "aligned"
    assert report["answer"] == report["expected"]
    assert "set text_model to the CLIP checkpoint" in run_refused(capsys, "run", "--reducer", "CDPruner")
