"""Sweeps: a local sweep runs the same commands as the agent of W&B."""

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
from tokenprune.cli.options import parse_reducer
from tokenprune.cli.sweep import mean_score
from tokenprune.configuration import as_config
from tokenprune.experiments.evaluation.experiment import Experiment
from tokenprune.experiments.evaluation.grid import parse_experiment
from tokenprune.experiments.tracking import sweep
from tokenprune.experiments.tracking.sweep_file import read_sweep, validate_sweep
from tokenprune.experiments.tracking.sweep_runs import count_runs, generate_runs
from tokenprune.strategies import HiRED

FOLDER = Path(__file__).parents[2] / "experiments" / "configs" / "sweeps"
FILES = sorted(FOLDER.glob("*.yaml"))
GRID = {"method": "grid", "parameters": {"b": {"values": [1, 2]}, "a": {"values": ["x", "y", "z"]}, "c": {"value": 0}}}


def parse_command(line: list[str]) -> Experiment:
    """Return the experiment of a command line of `tokenprune evaluate`, without its output options."""
    output_options = ("--out=", "--wandb=")
    return parse_experiment(
        [argument for argument in line[line.index("evaluate") + 1 :] if not argument.startswith(output_options)]
    )


def write_sweep(tmp_path: Path, **config: Any) -> Path:
    content = {"command": ["${env}", "tokenprune", "evaluate", "${args}"], **config}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "sweep.yaml"


def draw_values(spec: dict[str, Any], number: int = 400, seed: int = 0) -> list[Any]:
    """Draw values of a parameter."""
    config = {"method": "random", "parameters": {"x": spec}}
    return [run["x"] for run in generate_runs(config, number, seed)]


def test_all_files_are_found() -> None:
    assert {file.name for file in FILES} >= {"components.yaml", "hired_alpha.yaml", "random_search.yaml", "stages.yaml"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_header_of_a_file_has_its_commands_and_number_of_runs(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = "".join(itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines(keepends=True)))
    path = f"experiments/configs/sweeps/{file.name}"
    assert header.startswith(f"# wandb sweep {path}")
    assert "# wandb agent " in header
    assert f"tokenprune sweep {path} --local" in header
    stated_count = re.search(r"^# (\d+) runs", header, re.MULTILINE)
    assert stated_count
    config = read_sweep(file)
    runs = list(generate_runs(config))
    assert len(runs) == int(stated_count[1]) == count_runs(config)
    assert len({str(run) for run in runs}) == len(runs)
    assert not caplog.records  # no warning about a whole number written as 1.0
    assert config["command"] == ["${env}", "tokenprune", "evaluate", "${args}"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_command_line_gives_the_parameters_of_the_file(file: Path) -> None:
    config = read_sweep(file)
    reducers = []
    for parameters in generate_runs(config):
        line = sweep.build_command(config, parameters)
        assert line[:3] == ["/usr/bin/env", "tokenprune", "evaluate"]
        experiment = parse_command(line)
        reducer = experiment.reducer
        assert (type(experiment.task).__name__.lower(), experiment.model) == (parameters["task"], parameters["model"])
        assert experiment.task.number == parameters["task.number"]  # type: ignore[attr-defined]
        reducers.append(str(as_config(reducer)))
        assert reducer.label == parse_reducer(["--reducer", parameters["reducer"]]).label
        assert reducer.budget == parameters.get("reducer.budget", parameters.get("reducer.parts.0.budget"))
        for name, value in parameters.items():
            if not name.startswith("reducer.") or name == "reducer.budget":
                continue
            component: Any = reducer
            for part in name.split(".")[1:]:
                component = component[int(part)] if part.isdigit() else getattr(component, part)
            if isinstance(value, dict):
                assert type(component).__name__ == value["class_path"]
                assert {key: getattr(component, key) for key in value["init_args"]} == value["init_args"]
            else:
                assert value in (component, type(component).__name__)
    assert len(set(reducers)) == len(reducers)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_arguments_equal_the_arguments_of_the_wandb_agent(file: Path) -> None:
    agent = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    unusual_values = {
        "z": None,
        "z.y": "two words",
        "z.x": {"a": [1, None, True], "b": "it's"},
        "y": True,
        "x": -2,
        "w": 1e-05,
    }
    for parameters in [*generate_runs(read_sweep(file)), unusual_values]:
        command_args = {"args": {name: {"value": parameters[name]} for name in sorted(parameters)}}
        assert sweep.format_arguments(parameters) == agent.create_sweep_command_args(command_args)["args"]


def test_a_parameter_precedes_its_nested_parameters() -> None:
    parameters = {
        "reducer.selection.layer": -2,
        "reducer": "HiRED",
        "reducer.selection": {"class_path": "A"},
        "json": False,
    }
    assert sweep.format_arguments(parameters) == [
        "--json=False",
        "--reducer=HiRED",
        "--reducer.selection={'class_path': 'A'}",
        "--reducer.selection.layer=-2",
    ]


def test_a_grid_is_complete_and_in_the_order_of_wandb() -> None:
    runs = list(generate_runs(GRID))
    assert [(run["a"], run["b"]) for run in runs] == list(itertools.product("xyz", [1, 2]))
    assert all(run["c"] == 0 for run in runs)
    assert list(generate_runs(GRID, 4)) == runs[:4]
    assert list(generate_runs({**GRID, "run_cap": 3}, 4)) == runs[:3]
    integers = {"method": "grid", "parameters": {"n": {"min": 2, "max": 4}}}
    assert [run["n"] for run in generate_runs(integers)] == [2, 3, 4]
    steps = {"method": "grid", "parameters": {"n": {"distribution": "q_uniform", "min": 0.1, "max": 0.5, "q": 0.1}}}
    assert [run["n"] for run in generate_runs(steps)] == [0.1, 0.2, 0.3, 0.4]


def test_nested_parameters_become_dictionaries() -> None:
    inner = {"parameters": {"layer": {"values": [1, 2]}, "heads": {"value": "max"}}}
    runs = list(generate_runs({"method": "grid", "parameters": {"selection": inner, "a": {"value": 1}}}))
    assert runs == [{"a": 1, "selection": {"heads": "max", "layer": layer}} for layer in (1, 2)]
    assert sweep.format_arguments(runs[0]) == ["--a=1", "--selection={'heads': 'max', 'layer': 1}"]


def test_random_draws_depend_only_on_the_seed() -> None:
    config = {"method": "random", "parameters": {"a": {"min": 0.0, "max": 1.0}, "b": {"values": [1, 2, 3]}}}
    runs = list(generate_runs(config, 10, seed=3))
    assert list(generate_runs(config, 4, seed=3)) == runs[:4]
    assert list(generate_runs(config, 10, seed=4)) != runs
    assert len({run["a"] for run in runs}) == 10


def test_distributions_have_their_range_and_median() -> None:
    def median(spec: dict[str, Any]) -> float:
        ordered = sorted(draw_values(spec))
        return float(ordered[len(ordered) // 2])

    def is_between(spec: dict[str, Any], low: float, high: float) -> bool:
        return all(low <= value <= high for value in draw_values(spec))

    assert set(draw_values({"min": 1, "max": 3})) == {1, 2, 3}
    assert is_between({"min": 0.5, "max": 3}, 0.5, 3)
    assert median({"min": 0.0, "max": 2.0}) == pytest.approx(1, abs=0.15)
    log_values = {"distribution": "log_uniform_values", "min": 0.01, "max": 1}
    assert is_between(log_values, 0.01, 1)
    assert median(log_values) == pytest.approx(0.1, rel=0.4)
    exponents = {"distribution": "log_uniform", "min": math.log(0.01), "max": 0}
    assert median(exponents) == pytest.approx(0.1, rel=0.4)
    assert is_between({"distribution": "inv_log_uniform", "min": 0, "max": math.log(100)}, 0.0099, 1.0001)
    assert is_between({"distribution": "inv_log_uniform_values", "min": 0.01, "max": 1}, 0.01, 1)
    assert median({"distribution": "normal", "mu": 5, "sigma": 2}) == pytest.approx(5, abs=0.4)
    assert median({"distribution": "log_normal", "mu": 1}) == pytest.approx(math.e, rel=0.25)
    assert is_between({"distribution": "beta", "a": 2, "b": 2}, 0, 1)
    assert set(draw_values({"distribution": "q_uniform", "min": 0.1, "max": 0.5, "q": 0.2})) <= {0.0, 0.2, 0.4, 0.6}
    assert all(
        isinstance(value, int) for value in draw_values({"distribution": "q_uniform", "min": 1, "max": 9, "q": 2})
    )
    assert set(draw_values({"values": ["a", "b"], "probabilities": [1, 0]})) == {"a"}
    assert min(Counter(draw_values({"values": ["a", "b"]})).values()) > 150


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "method"),
        ({"method": "grid"}, "parameters"),
        ({"method": "hyperband", "parameters": {"a": {"value": 1}}}, "grid, random or bayes"),
        ({"method": "grid", "parameters": {"a": 1}}, "value: 1"),
        ({"method": "grid", "parameters": {"a": {"vaules": [1]}}}, "a: max, min is missing"),
        ({"method": "grid", "parameters": {"a": {"values": [1], "min": 0}}}, "a: min is not allowed"),
        ({"method": "grid", "parameters": {"a": {"values": []}}}, "non-empty list"),
        ({"method": "grid", "parameters": {"a": {"min": 0.1, "max": 1}}}, "does not support the distribution uniform"),
        ({"method": "random", "parameters": {"a": {"min": 2, "max": 1}}}, "above"),
        ({"method": "random", "parameters": {"a": {"distribution": "cauchy"}}}, "cauchy"),
        ({"method": "random", "parameters": {"a": {"values": [1], "probabilities": [0.5, 0.5]}}}, "probability"),
        ({"method": "random", "parameters": {"a": {"values": [1]}}}, "run_cap"),
        ({"method": "grid", "parameters": {"a": {"values": [1]}}, "run_cap": 0}, "run_cap"),
    ],
)
def test_an_invalid_sweep_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generate_runs(config)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"odd\.yaml is no YAML"):
        read_sweep(tmp_path / "odd.yaml")
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        read_sweep(tmp_path / "none.yaml")


def test_values_that_the_server_changes_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    component = {"class_path": "GuidedAllocation", "init_args": {"temperature": 10.0, "retention": None}}
    parameters = {"reducer.budget": {"values": [0.5, 1.0]}, "reducer.allocation": {"value": component}}
    validate_sweep({"method": "grid", "parameters": parameters})
    hint = "a budget of 1 is one token, write 100% for all tokens"
    assert [record.getMessage() for record in caplog.records] == [
        f"reducer.allocation: W&B's server may pass 10.0 as 10; {hint}",
        "reducer.allocation: W&B passes null as the word None; omit the parameter instead",
        f"reducer.budget: W&B's server may pass 1.0 as 1; {hint}",
    ]


def test_percentages_are_not_changed_by_the_server(caplog: pytest.LogCaptureFixture) -> None:
    config = {"method": "grid", "parameters": {"reducer.budget": {"values": ["20%", "100%"]}}}
    experiments = [
        parse_command(["evaluate", *sweep.format_arguments(parameters)]) for parameters in generate_runs(config)
    ]
    assert not caplog.records
    assert [experiment.reducer.budget for experiment in experiments] == [0.2, 1.0]
    hashes = [Experiment(reducer=HiRED(ratio)).hash() for ratio in (0.2, 1.0)]
    assert [experiment.hash() for experiment in experiments] == hashes
    with pytest.warns(OneTokenWarning, match="one token"):
        assert parse_command(["evaluate", "--reducer.budget=1"]).reducer.budget == 1


def test_a_failed_run_does_not_stop_the_sweep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[list[str]] = []

    def command(line: list[str]) -> int:
        lines.append(line)
        return 2 if "--a=y" in line else 0

    caplog.set_level(logging.INFO, sweep.__name__)
    codes = sweep.run_local(write_sweep(tmp_path, **GRID), command)
    assert codes == [0, 0, 2, 2, 0, 0]
    assert len({tuple(line) for line in lines}) == 6
    assert lines[0] == ["evaluate", "--a=x", "--b=1", "--c=0"]
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "run 3 of 6 ended with code 2: tokenprune evaluate --a=y --b=1 --c=0",
        "run 4 of 6 ended with code 2: tokenprune evaluate --a=y --b=2 --c=0",
    ]
    assert "run 1 of 6: tokenprune evaluate --a=x --b=1 --c=0" in caplog.text


def test_ctrl_c_stops_the_sweep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sweep.run_local(write_sweep(tmp_path, **GRID), lambda line: 130 if "--b=2" in line else 0) == [0, 130]
    assert "stopped after 2 of 6 runs" in caplog.text


def test_a_local_sweep_runs_the_evaluate_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []
    monkeypatch.setattr("tokenprune.cli.evaluate.run", lambda line: lines.append(list(line)))
    assert main(["sweep", str(write_sweep(tmp_path, **GRID)), "--local", "--count", "2"]) == 0
    assert lines == [["--a=x", "--b=1", "--c=0"], ["--a=x", "--b=2", "--c=0"]]


def test_commands_expand_the_macros_of_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "somewhere")
    file = write_sweep(
        tmp_path, **GRID, command=["${env}", "python", "-m", "tokenprune", "check", "--out=${envvar:PLACE}", "${args}"]
    )
    lines: list[list[str]] = []
    sweep.run_local(file, lambda line: lines.append(line) or 0, count=1)  # type: ignore[func-returns-value]
    assert lines == [["check", "--out=somewhere", "--a=x", "--b=1", "--c=0"]]
    for command in (["python", "train.py", "${args}"], ["tokenprune", "evaluate", "${args_json}"]):
        with pytest.raises(ValueError, match="tokenprune"):
            sweep.run_local(write_sweep(tmp_path, **GRID, command=command), lambda line: 0)
    assert sweep.build_command({"program": "tokenprune"}, {"a": 1}) == ["/usr/bin/env", "python", "tokenprune", "--a=1"]


BAYES = {
    "method": "bayes",
    "metric": {"name": "eval/score", "goal": "maximize"},
    "parameters": {"a": {"min": 0.1, "max": 0.9}},
    "run_cap": 3,
}


def test_bayes_requires_the_sweeps_package_and_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sweeps", None)
    with pytest.raises(ValueError, match="wandb sweep FILE"):
        generate_runs(BAYES)
    loss_sweep = {**BAYES, "metric": {"name": "loss", "goal": "minimize"}}
    assert main(["sweep", str(write_sweep(tmp_path, **loss_sweep)), "--local"]) == 2
    assert "eval/score" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give `measure`"):
        sweep.run_local(write_sweep(tmp_path, **BAYES), lambda line: 0)


def test_the_score_of_a_run_is_read_from_its_records(tmp_path: Path) -> None:
    line = ["evaluate", "--reducer.budget=0.1", f"--out={tmp_path}", "--quiet=True"]
    with pytest.raises(ValueError, match="no answered sample"):
        mean_score(line)
    folder = tmp_path / "settings" / parse_command(["evaluate", "--reducer.budget=0.1"]).hash()
    folder.mkdir(parents=True)
    rows = [{"score": 1.0, "error": None}, {"score": 0.5, "error": None}, {"score": 0.0, "error": "x"}]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert mean_score(line) == 0.75
    with pytest.raises(ValueError, match="not of 'check'"):
        mean_score(["check"])


def test_bayes_passes_results_to_the_sweeps_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    histories: list[list[tuple[str, dict[str, float]]]] = []

    def next_run(config: dict[str, Any], previous_runs: list[Any]) -> Any:
        histories.append([(run.state, run.summary_metrics) for run in previous_runs])
        return SimpleNamespace(config={"a": {"value": 0.5 + len(previous_runs)}})

    library = SimpleNamespace(
        next_run=next_run, RunState=SimpleNamespace(failed="failed", finished="finished"), __spec__=SimpleNamespace()
    )
    monkeypatch.setitem(sys.modules, "sweeps", library)
    codes = sweep.run_local(
        write_sweep(tmp_path, **BAYES),
        lambda line: int("--a=1.5" in line),
        measure=lambda parameters: parameters["a"] * 2,
    )
    assert codes == [0, 1, 0]
    assert histories[-1] == [("finished", {"eval/score": 1.0}), ("failed", {})]
