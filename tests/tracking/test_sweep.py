"""Sweeps: what runs here is what W&B's agent would run."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tokenprune.budget import OneTokenWarning
from tokenprune.cli.main import main
from tokenprune.cli.sweep import mean_score
from tokenprune.configuration import as_config
from tokenprune.experiments.evaluation.experiment import Experiment
from tokenprune.experiments.evaluation.grid import experiment_of
from tokenprune.experiments.tracking import sweep
from tokenprune.strategies import HiRED

FOLDER = Path(__file__).parents[2] / "experiments" / "configs" / "sweeps"
FILES = sorted(FOLDER.glob("*.yaml"))
GRID = {"method": "grid", "parameters": {"b": {"values": [1, 2]}, "a": {"values": ["x", "y", "z"]}, "c": {"value": 0}}}


def parsed(line: list[str]) -> Experiment:
    """The experiment that a command line of `tokenprune evaluate` describes; where it writes is no part of that."""
    own = ("--out=", "--wandb=")
    return experiment_of([word for word in line[line.index("evaluate") + 1 :] if not word.startswith(own)])


def write(tmp_path: Path, **config: Any) -> Path:
    content = {"command": ["${env}", "tokenprune", "evaluate", "${args}"], **config}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "sweep.yaml"


def values(spec: dict[str, Any], number: int = 400, seed: int = 0) -> list[Any]:
    """Draws of one parameter."""
    config = {"method": "random", "parameters": {"x": spec}}
    return [one["x"] for one in sweep.runs(config, number, seed)]


def test_all_files_are_found() -> None:
    assert {file.name for file in FILES} >= {"components.yaml", "hired_alpha.yaml", "random_search.yaml"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_says_how_it_is_run_and_how_many_runs_it_makes(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = "".join(itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines(keepends=True)))
    place = f"experiments/configs/sweeps/{file.name}"
    assert header.startswith(f"# wandb sweep {place}")
    assert "# wandb agent " in header
    assert f"tokenprune sweep {place} --local" in header
    promised = re.search(r"^# (\d+) runs", header, re.MULTILINE)
    assert promised
    config = sweep.read(file)
    made = list(sweep.runs(config))
    assert len(made) == int(promised[1]) == sweep.number_of_runs(config)
    assert len({str(one) for one in made}) == len(made)
    assert not caplog.records  # no whole number is written as 1.0
    assert config["command"] == ["${env}", "tokenprune", "evaluate", "${args}"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_command_line_means_what_the_file_says(file: Path) -> None:
    config = sweep.read(file)
    reducers = []
    for parameters in sweep.runs(config):
        line = sweep.words(config, parameters)
        assert line[:3] == ["/usr/bin/env", "tokenprune", "evaluate"]
        experiment = parsed(line)
        reducer = experiment.reducer
        assert (type(experiment.task).__name__.lower(), experiment.model) == (parameters["task"], parameters["model"])
        assert experiment.task.number == parameters["task.number"]  # type: ignore[attr-defined]
        reducers.append(str(as_config(reducer)))
        assert type(reducer).__name__ == parameters["reducer"]
        assert reducer.budget == parameters["reducer.budget"]
        for name, value in parameters.items():
            if not name.startswith("reducer.") or name == "reducer.budget":
                continue
            found = reducer
            for part in name.split(".")[1:]:
                found = getattr(found, part)
            if isinstance(value, dict):
                assert type(found).__name__ == value["class_path"]
                assert {key: getattr(found, key) for key in value["init_args"]} == value["init_args"]
            else:
                assert value in (found, type(found).__name__)
    assert len(set(reducers)) == len(reducers)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_arguments_are_those_of_wandb(file: Path) -> None:
    agent = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    odd = {"z": None, "z.y": "two words", "z.x": {"a": [1, None, True], "b": "it's"}, "y": True, "x": -2, "w": 1e-05}
    for parameters in [*sweep.runs(sweep.read(file)), odd]:
        sent = {"args": {name: {"value": parameters[name]} for name in sorted(parameters)}}
        assert sweep.arguments(parameters) == agent.create_sweep_command_args(sent)["args"]


def test_parents_come_before_their_children() -> None:
    given = {"reducer.selection.layer": -2, "reducer": "HiRED", "reducer.selection": {"class_path": "A"}, "json": False}
    assert sweep.arguments(given) == [
        "--json=False",
        "--reducer=HiRED",
        "--reducer.selection={'class_path': 'A'}",
        "--reducer.selection.layer=-2",
    ]


def test_a_grid_is_complete_and_in_wandbs_order() -> None:
    made = list(sweep.runs(GRID))
    assert [(one["a"], one["b"]) for one in made] == list(itertools.product("xyz", [1, 2]))
    assert all(one["c"] == 0 for one in made)
    assert list(sweep.runs(GRID, 4)) == made[:4]
    assert list(sweep.runs({**GRID, "run_cap": 3}, 4)) == made[:3]
    whole = {"method": "grid", "parameters": {"n": {"min": 2, "max": 4}}}
    assert [one["n"] for one in sweep.runs(whole)] == [2, 3, 4]
    steps = {"method": "grid", "parameters": {"n": {"distribution": "q_uniform", "min": 0.1, "max": 0.5, "q": 0.1}}}
    assert [one["n"] for one in sweep.runs(steps)] == [0.1, 0.2, 0.3, 0.4]


def test_nested_parameters_become_dictionaries() -> None:
    inner = {"parameters": {"layer": {"values": [1, 2]}, "heads": {"value": "max"}}}
    made = list(sweep.runs({"method": "grid", "parameters": {"selection": inner, "a": {"value": 1}}}))
    assert made == [{"a": 1, "selection": {"heads": "max", "layer": layer}} for layer in (1, 2)]
    assert sweep.arguments(made[0]) == ["--a=1", "--selection={'heads': 'max', 'layer': 1}"]


def test_random_draws_depend_on_the_seed_alone() -> None:
    config = {"method": "random", "parameters": {"a": {"min": 0.0, "max": 1.0}, "b": {"values": [1, 2, 3]}}}
    ten = list(sweep.runs(config, 10, seed=3))
    assert list(sweep.runs(config, 4, seed=3)) == ten[:4]
    assert list(sweep.runs(config, 10, seed=4)) != ten
    assert len({one["a"] for one in ten}) == 10


def test_distributions_have_their_range_and_middle() -> None:
    def middle(spec: dict[str, Any]) -> float:
        drawn = sorted(values(spec))
        return float(drawn[len(drawn) // 2])

    def between(spec: dict[str, Any], low: float, high: float) -> bool:
        return all(low <= value <= high for value in values(spec))

    assert set(values({"min": 1, "max": 3})) == {1, 2, 3}
    assert between({"min": 0.5, "max": 3}, 0.5, 3)
    assert middle({"min": 0.0, "max": 2.0}) == pytest.approx(1, abs=0.15)
    spread = {"distribution": "log_uniform_values", "min": 0.01, "max": 1}
    assert between(spread, 0.01, 1)
    assert middle(spread) == pytest.approx(0.1, rel=0.4)
    exponents = {"distribution": "log_uniform", "min": math.log(0.01), "max": 0}
    assert middle(exponents) == pytest.approx(0.1, rel=0.4)
    assert between({"distribution": "inv_log_uniform", "min": 0, "max": math.log(100)}, 0.0099, 1.0001)
    assert between({"distribution": "inv_log_uniform_values", "min": 0.01, "max": 1}, 0.01, 1)
    assert middle({"distribution": "normal", "mu": 5, "sigma": 2}) == pytest.approx(5, abs=0.4)
    assert middle({"distribution": "log_normal", "mu": 1}) == pytest.approx(math.e, rel=0.25)
    assert between({"distribution": "beta", "a": 2, "b": 2}, 0, 1)
    assert set(values({"distribution": "q_uniform", "min": 0.1, "max": 0.5, "q": 0.2})) <= {0.0, 0.2, 0.4, 0.6}
    assert all(isinstance(value, int) for value in values({"distribution": "q_uniform", "min": 1, "max": 9, "q": 2}))
    assert set(values({"values": ["a", "b"], "probabilities": [1, 0]})) == {"a"}
    assert min(Counter(values({"values": ["a", "b"]})).values()) > 150


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([], "method"),
        ({"method": "grid"}, "parameters"),
        ({"method": "hyperband", "parameters": {"a": {"value": 1}}}, "grid, random or bayes"),
        ({"method": "grid", "parameters": {"a": 1}}, "value: 1"),
        ({"method": "grid", "parameters": {"a": {"vaules": [1]}}}, "a: max, min is missing"),
        ({"method": "grid", "parameters": {"a": {"values": [1], "min": 0}}}, "a: min means nothing"),
        ({"method": "grid", "parameters": {"a": {"values": []}}}, "something in it"),
        ({"method": "grid", "parameters": {"a": {"min": 0.1, "max": 1}}}, "no place for uniform"),
        ({"method": "random", "parameters": {"a": {"min": 2, "max": 1}}}, "above"),
        ({"method": "random", "parameters": {"a": {"distribution": "cauchy"}}}, "cauchy"),
        ({"method": "random", "parameters": {"a": {"values": [1], "probabilities": [0.5, 0.5]}}}, "probability"),
        ({"method": "random", "parameters": {"a": {"values": [1]}}}, "run_cap"),
        ({"method": "grid", "parameters": {"a": {"values": [1]}}, "run_cap": 0}, "run_cap"),
    ],
)
def test_what_cannot_be_run_is_said(config: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        sweep.runs(config)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"odd\.yaml is no YAML"):
        sweep.read(tmp_path / "odd.yaml")
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        sweep.read(tmp_path / "none.yaml")


def test_values_that_arrive_as_others_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    part = {"class_path": "GuidedAllocation", "init_args": {"temperature": 10.0, "retention": None}}
    parameters = {"reducer.budget": {"values": [0.5, 1.0]}, "reducer.allocation": {"value": part}}
    sweep.check({"method": "grid", "parameters": parameters})
    hint = "a budget of 1 is one token, write 100% for all tokens"
    assert [one.getMessage() for one in caplog.records] == [
        f"reducer.allocation: W&B's server may pass 10.0 as 10; {hint}",
        "reducer.allocation: W&B passes null as the word None; leave the parameter out instead",
        f"reducer.budget: W&B's server may pass 1.0 as 1; {hint}",
    ]


def test_ratios_as_text_mean_the_ratio_whatever_the_server_does(caplog: pytest.LogCaptureFixture) -> None:
    config = {"method": "grid", "parameters": {"reducer.budget": {"values": ["20%", "100%"]}}}
    experiments = [parsed(["evaluate", *sweep.arguments(parameters)]) for parameters in sweep.runs(config)]
    assert not caplog.records
    assert [experiment.reducer.budget for experiment in experiments] == [0.2, 1.0]
    hashes = [Experiment(reducer=HiRED(ratio)).hash() for ratio in (0.2, 1.0)]
    assert [experiment.hash() for experiment in experiments] == hashes
    with pytest.warns(OneTokenWarning, match="one token"):
        assert parsed(["evaluate", "--reducer.budget=1"]).reducer.budget == 1


def test_each_run_is_started_once_whatever_the_others_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[list[str]] = []

    def command(line: list[str]) -> int:
        seen.append(line)
        return 2 if "--a=y" in line else 0

    caplog.set_level(logging.INFO, sweep.__name__)
    codes = sweep.run_local(write(tmp_path, **GRID), command)
    assert codes == [0, 0, 2, 2, 0, 0]
    assert len({tuple(line) for line in seen}) == 6
    assert seen[0] == ["evaluate", "--a=x", "--b=1", "--c=0"]
    assert [one.message for one in caplog.records if one.levelno == logging.WARNING] == [
        "run 3 of 6 ended with code 2: tokenprune evaluate --a=y --b=1 --c=0",
        "run 4 of 6 ended with code 2: tokenprune evaluate --a=y --b=2 --c=0",
    ]
    assert "run 1 of 6: tokenprune evaluate --a=x --b=1 --c=0" in caplog.text


def test_ctrl_c_stops_the_sweep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sweep.run_local(write(tmp_path, **GRID), lambda line: 130 if "--b=2" in line else 0) == [0, 130]
    assert "stopped after 2 of 6 runs" in caplog.text


def test_the_command_line_itself_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("tokenprune.cli.evaluate.run", lambda line: seen.append(list(line)))
    assert main(["sweep", str(write(tmp_path, **GRID)), "--local", "--count", "2"]) == 0
    assert seen == [["--a=x", "--b=1", "--c=0"], ["--a=x", "--b=2", "--c=0"]]


def test_commands_are_made_as_the_agent_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "somewhere")
    file = write(
        tmp_path, **GRID, command=["${env}", "python", "-m", "tokenprune", "check", "--out=${envvar:PLACE}", "${args}"]
    )
    seen: list[list[str]] = []
    sweep.run_local(file, lambda line: seen.append(line) or 0, count=1)  # type: ignore[func-returns-value]
    assert seen == [["check", "--out=somewhere", "--a=x", "--b=1", "--c=0"]]
    for odd in (["python", "train.py", "${args}"], ["tokenprune", "evaluate", "${args_json}"]):
        with pytest.raises(ValueError, match="tokenprune"):
            sweep.run_local(write(tmp_path, **GRID, command=odd), lambda line: 0)
    assert sweep.words({"program": "tokenprune"}, {"a": 1}) == ["/usr/bin/env", "python", "tokenprune", "--a=1"]


BAYES = {
    "method": "bayes",
    "metric": {"name": "eval/score", "goal": "maximize"},
    "parameters": {"a": {"min": 0.1, "max": 0.9}},
    "run_cap": 3,
}


def test_bayes_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sweeps", None)
    with pytest.raises(ValueError, match="wandb sweep FILE"):
        sweep.runs(BAYES)
    other = {**BAYES, "metric": {"name": "loss", "goal": "minimize"}}
    assert main(["sweep", str(write(tmp_path, **other)), "--local"]) == 2
    assert "eval/score" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give `measure`"):
        sweep.run_local(write(tmp_path, **BAYES), lambda line: 0)


def test_the_score_of_a_run_is_read_from_its_records(tmp_path: Path) -> None:
    line = ["evaluate", "--reducer.budget=0.1", f"--out={tmp_path}", "--quiet=True"]
    with pytest.raises(ValueError, match="no answered sample"):
        mean_score(line)
    folder = tmp_path / "settings" / parsed(["evaluate", "--reducer.budget=0.1"]).hash()
    folder.mkdir(parents=True)
    rows = [{"score": 1.0, "error": None}, {"score": 0.5, "error": None}, {"score": 0.0, "error": "x"}]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert mean_score(line) == 0.75
    with pytest.raises(ValueError, match="not of 'check'"):
        mean_score(["check"])


def test_bayes_hands_results_to_wandbs_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[str, dict[str, float]]]] = []

    def next_run(config: dict[str, Any], done: list[Any]) -> Any:
        seen.append([(run.state, run.summary_metrics) for run in done])
        return SimpleNamespace(config={"a": {"value": 0.5 + len(done)}})

    library = SimpleNamespace(
        next_run=next_run, RunState=SimpleNamespace(failed="failed", finished="finished"), __spec__=SimpleNamespace()
    )
    monkeypatch.setitem(sys.modules, "sweeps", library)
    codes = sweep.run_local(
        write(tmp_path, **BAYES), lambda line: int("--a=1.5" in line), measure=lambda given: given["a"] * 2
    )
    assert codes == [0, 1, 0]
    assert seen[-1] == [("finished", {"eval/score": 1.0}), ("failed", {})]
