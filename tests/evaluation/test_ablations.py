"""Ablations: grids, shards, workers, resuming, and validation before the first run."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.small_grid import SMALL, records, remove_times, start, write_config
from tokenprune.cli.main import main
from tokenprune.experiments.analysis.report.formatting import format_interval
from tokenprune.experiments.analysis.results import mean_score
from tokenprune.experiments.evaluation.experiment import Experiment, Setting
from tokenprune.experiments.evaluation.grid import expand, format_value, group_by_model, select_shard
from tokenprune.experiments.evaluation.records import list_recorded_samples
from tokenprune.strategies import SCOPE, HiRED, UniformStride
from tokenprune.strategies.components import RandomSelection

CONFIGS = Path(__file__).parents[2] / "experiments/configs"

pytestmark = pytest.mark.usefixtures("in_empty_folder")


def run_refused_ablation(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run `tokenprune ablate`, which must fail, and return its messages."""
    assert main(["ablate", *arguments]) == 2
    return capsys.readouterr().err


def test_a_grid_includes_full_tokens_and_baselines() -> None:
    settings = expand(SMALL)
    assert Counter(setting.role for setting in settings) == {"grid": 4, "full": 1, "baseline": 2 * 7}
    assert len({setting.experiment.hash() for setting in settings}) == len(settings)
    assert settings[1].name == "HiRED, budget=0.05, selection=TopAttentionSelection(layer=first)"
    assert settings[1].factors == {"reducer.budget": "0.05", "reducer.selection": "TopAttentionSelection(layer=first)"}
    random_reducers = [setting.experiment.reducer for setting in settings if "Random" in setting.name]
    assert [reducer.selection for reducer in random_reducers[:3]] == [RandomSelection(seed) for seed in range(3)]  # type: ignore[attr-defined]
    assert len(expand({**SMALL, "baselines": False})) == 4
    assert len(expand({**SMALL, "random_seeds": 1})) == 19 - 4


def test_a_grid_can_vary_strategies_and_presets() -> None:
    config = {**SMALL, "grid": {"reducer": ["HiRED.release", "scope"], "reducer.budget": [0.1]}, "baselines": False}
    preset, strategy = expand(config)
    assert preset.experiment.reducer == HiRED.release(0.1)
    assert strategy.experiment.reducer == SCOPE(0.1)
    assert (preset.name, strategy.name) == ("reducer=HiRED.release, budget=0.1", "reducer=scope, budget=0.1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grid": {"reducer.selection": ["TopAttenton"]}},
            "selection=TopAttenton: .*Did you mean TopAttentionSelection",
        ),
        ({"grid": {"reducer.budgt": [0.1]}}, "budgt=0.1: .*budgt.*did you mean budget"),
        (
            {"grid": {"reducer.budget": [0.1, 1.5, -2]}},
            "(?s)2 settings of the grid are not valid.*budget=1.5.*budget=-2",
        ),
        ({"grid": {"reducer.budget": 0.1}}, "grid.reducer.budget: give a list of values"),
        ({"task": "bords"}, "no task is called 'bords'. Did you mean Boards"),
        ({"modell": "mini"}, "no key 'modell' in an ablation .did you mean model"),
        ({"reducer": "HiRD"}, "no strategy is called 'HiRD'. Did you mean HiRED"),
    ],
)
def test_an_invalid_grid_is_refused_before_a_run(
    change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        expand({**SMALL, **change})
    assert main(["ablate", write_config({**SMALL, **change}), "--out", "out"]) == 2
    assert not Path("out").exists()


def test_a_directory_of_another_ablation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        **SMALL,
        "grid": {"reducer.budget": [0.1]},
        "baselines": False,
        "task": {"class_path": "boards", "init_args": {"number": 1}},
    }
    assert main(["ablate", write_config(config), "--out", "out", "--quiet"]) == 0
    before = records("out")
    assert main(["ablate", write_config(config), "--out", "out"]) == 0
    out, err = capsys.readouterr()
    assert "0 (all records exist)" in err
    assert out.startswith("1 setting on mini, ")
    assert out.splitlines()[1:3] == ["method  10%", f"HiRED   {format_interval(mean_score(*before.values()))}"]
    assert records("out") == before
    assert main(["ablate", write_config({**config, "seed": 0, "dtype": "auto"}), "--out", "out", "--quiet"]) == 0
    assert "holds another ablation" in run_refused_ablation(capsys, write_config({**config, "seed": 3}), "--out", "out")
    assert "no such file" in run_refused_ablation(capsys, "nowhere.yaml")


def test_shards_are_parts_of_the_grid() -> None:
    settings = expand(SMALL)
    parts = [select_shard(settings, f"{number}/3") for number in range(3)]
    hashes = sorted(setting.experiment.hash() for part in parts for setting in part)
    assert hashes == sorted(setting.experiment.hash() for setting in settings)
    with pytest.raises(ValueError, match="write i/n"):
        select_shard(settings, "3/3")


def count_records(out: str) -> int:
    return sum(len(list_recorded_samples(setting)) for setting in Path(out, "settings").glob("*"))


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_without_lost_or_repeated_records(kills: int) -> None:
    config = write_config({**SMALL, "batch_size": 1, "baselines": False})
    assert main(["ablate", config, "--out", "whole", "--quiet"]) == 0
    expected = remove_times(records("whole"))
    killed = 0
    for _ in range(20):
        process = start(config, "--out", "killed")
        before = count_records("killed")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            count = (
                sum(len(list_recorded_samples(setting)) for setting in Path("killed/settings").glob("*"))
                if Path("killed/settings").is_dir()
                else 0
            )
            if killed < kills and count >= before + 30:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
    assert killed == kills
    assert remove_times(records("killed")) == expected


@pytest.mark.slow  # starts several processes
def test_workers_share_the_images_and_shards_the_settings() -> None:
    config = write_config({**SMALL, "baselines": False})
    assert main(["ablate", config, "--out", "one", "--quiet"]) == 0
    assert start(config, "--out", "two", "--workers", "2").wait() == 0
    for number in range(2):
        assert main(["ablate", config, "--out", "parts", "--shard", f"{number}/2", "--quiet"]) == 0
    assert remove_times(records("one")) == remove_times(records("two")) == remove_times(records("parts"))
    assert not list(Path("two/settings").glob("*/records.part*"))


LARGE_GRIDS = (
    *("hired/alpha.yaml", "hired/benchmarks.yaml", "hired/table3.yaml", "hired/table5.yaml"),
    *("mini/components.yaml", "mini/encoder.yaml", "mini/hired_layers.yaml"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LARGE_GRIDS else ())
        for name in sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("[hm]*/*.yaml"))
    ],
)
def test_a_shipped_grid_has_the_stated_number_of_runs(name: str) -> None:
    command_line, _, count_line, *_ = (CONFIGS / name).read_text().split("\n")
    assert command_line.startswith(f"# tokenprune ablate experiments/configs/{name}")
    assert len(expand(yaml.safe_load((CONFIGS / name).read_text()))) == int(count_line.split()[1])


def test_every_task_gets_its_own_baselines() -> None:
    boards = [{"class_path": "boards", "init_args": {"first": first}} for first in (1000, 2000)]
    settings = expand({"grid": {"task": boards, "reducer.budget": [0.1, 0.2]}})
    assert Counter(setting.role for setting in settings) == {"grid": 4, "full": 2, "baseline": 4 * 7}


def test_all_models_and_tasks_are_validated_before_the_first_run(capsys: pytest.CaptureFixture[str]) -> None:
    boards = {"class_path": "boards", "init_args": {"number": 1}}
    missing_folder = {"class_path": "folder", "init_args": {"path": "nowhere"}}
    grid = {"task": [boards, missing_folder], "model": ["mini", "./no_model"]}
    message = run_refused_ablation(capsys, write_config({"grid": grid}), "--out", "out")
    assert "nowhere: no such file or folder" in message
    assert "./no_model: no such folder" in message
    assert not Path("out").exists()


def test_strategies_with_different_text_models_do_not_share() -> None:
    from tokenprune.strategies import CDPruner

    reducers = [HiRED(), CDPruner(text_model="a"), CDPruner(text_model="b"), UniformStride()]
    settings = [Setting(Experiment(reducer=reducer), str(number)) for number, reducer in enumerate(reducers)]
    assert [[setting.name for setting in group] for group in group_by_model(settings)] == [["0", "1", "3"], ["2"]]


def test_format_value() -> None:
    assert (
        format_value({"class_path": "a.b.TopAttentionSelection", "init_args": {"layer": [1, 2]}})
        == "TopAttentionSelection(layer=[1, 2])"
    )
    assert format_value({"class_path": "TopNormSelection"}) == "TopNormSelection"
    assert format_value(0.1) == "0.1"


def test_a_grid_varies_a_part_of_a_composition() -> None:
    config = {
        "reducer": "HiRED(0.4)+AtLayer(1, DivPrune(0.5))",
        "grid": {"reducer.parts.0.budget": [0.2, 0.4], "reducer.parts.1.layer": [1, 0.5]},
        "random_seeds": 1,
    }
    settings = expand(config)
    grid = [setting for setting in settings if setting.role == "grid"]
    assert [setting.describe()["budget"] for setting in grid] == [
        "20% + 50% from layer 1",
        "20% + 50% from depth 0.5",
        "40% + 50% from layer 1",
        "40% + 50% from depth 0.5",
    ]
    assert grid[0].name == "HiRED+AtLayer(DivPrune), parts.0.budget=0.2, parts.1.layer=1"
    baselines = {
        setting.describe()["strategy"]: setting.describe() for setting in settings if setting.role == "baseline"
    }
    assert set(baselines) == {"Random+AtLayer(Random)", "UniformStride+AtLayer(UniformStride)"}
    assert sum(setting.role == "baseline" for setting in settings) == 2 * 4
    assert {setting.experiment.reducer.label for setting in settings if setting.role == "full"} == {"UniformStride"}


def test_baselines_of_a_composition_keep_strategies_inside_the_tower() -> None:
    config = {"grid": {"reducer": ["ToMe(r=8)+HiRED(0.2)+AtLayer(1, DivPrune(0.5))"]}, "random_seeds": 1}
    labels = [setting.experiment.reducer.label for setting in expand(config) if setting.role == "baseline"]
    assert labels == ["ToMe+Random+AtLayer(Random)", "ToMe+UniformStride+AtLayer(UniformStride)"]


def test_a_grid_compares_strategies_of_all_stages() -> None:
    config = {"grid": {"reducer": ["HiRED(0.2)", "AtLayer(1, DivPrune(0.2))"]}, "random_seeds": 2}
    names = [setting.name for setting in expand(config) if setting.role == "baseline"]
    assert "BaseTileOnly, budget=0.2" in names
    assert "AtLayer(Random), seed 1, budget=20% from layer 1" in names
    assert "AtLayer(BaseTileOnly), budget=20% from layer 1" not in names


def test_a_cut_outside_the_llm_is_found_before_the_first_sample(capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "task": SMALL["task"],
        "grid": {"reducer": ["HiRED(0.2)", "AtLayer(7, DivPrune(0.2))"]},
        "baselines": False,
    }
    assert main(["ablate", write_config(config), "--out", "out", "--quiet"]) == 2
    message = capsys.readouterr().err
    assert "these settings cannot run" in message
    assert "reducer=AtLayer(7, DivPrune(0.2)): a cut at layer 7 is not inside an LLM with 3 layers" in message
    assert not list(Path("out").rglob("records.jsonl")) or not any(records("out").values())
