"""The command line, called as a user calls it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tokenprune import __version__
from tokenprune.budget import OneTokenWarning
from tokenprune.catalog import strategies
from tokenprune.cli.main import main
from tokenprune.configuration import as_config
from tokenprune.experiments.bench import selection_cost
from tokenprune.experiments.bench.selection_cost import ModelSize
from tokenprune.models import mini
from tokenprune.strategies import PruMerge, VisionZip
from tokenprune.strategies.components import ContextualMerging, MeanOfRestMerging, SaliencyCoverageSelection
from tokenprune.testing.tiny_models import random_image, tiny_model, tiny_processor

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


@pytest.fixture
def strategy_file(tmp_path: Path) -> Path:
    (tmp_path / "loud.py").write_text(STRATEGY_SOURCE)
    return tmp_path / "loud.py"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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


def component_config(report: dict[str, Any], name: str) -> Any:
    return report["reducer"]["init_args"][name]


# --- the main path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program", [[str(Path(sys.executable).parent / "tokenprune")], [sys.executable, "-m", "tokenprune"]]
)
def test_run_without_arguments(program: list[str], tmp_path: Path) -> None:
    result = subprocess.run([*program, "run", *FAST], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("all tokens", "HiRED", "right answer", "KV cache", "visual tokens: 100 asked, 100 kept", "overlay:"):
        assert word in result.stdout
    with Image.open(tmp_path / "tokenprune-out" / "overlay.png") as overlay:
        assert overlay.width > 500


def test_json_is_one_consistent_object(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys)
    for name in ("answer_full", "answer", "asked", "kept", "budgets", "prompt_length", "overlay", "ttft_ms"):
        assert name in report
    assert report["asked"] == report["kept"] == sum(report["budgets"]) == 100
    assert len(report["budgets"]) == 1 + report["tile_grid"][0] * report["tile_grid"][1] == 5
    dropped = report["valid"] - report["kept"] + report["newlines_full"] - report["newlines"]
    assert report["prompt_length_full"] - report["prompt_length"] == dropped
    assert report["kv_bytes"] / report["kv_bytes_full"] == report["prompt_length"] / report["prompt_length_full"]
    assert report["prefill_flops"] < report["prefill_flops_full"]
    assert (report["attention"], report["saliency_flops"]) == ("cls_attention", 0)
    assert report["results"][0]["question"] == report["question"]
    assert len({result["question"] for result in report["results"]}) >= 5
    assert Path(report["overlay"]).is_file()


def test_attention_is_a_signal_or_a_saliency_model(capsys: pytest.CaptureFixture[str]) -> None:
    """`attention` is accepted on the command line, in YAML by class name, and in the output of `--print_config`."""
    question = ["--question", "How many shapes are there?"]
    assert run_json(capsys, *question, "--reducer.attention", "received")["attention"] == "received_attention"
    options = ["--reducer.attention.model-name", "test_vit", "--reducer.attention.pretrained", "false"]
    arguments = [*question, "--reducer.attention", "timm-saliency", *options]
    report = run_json(capsys, *arguments)
    assert report["attention"] == "TimmSaliency(test_vit)"
    assert report["saliency_flops"] > 5 * 70e6
    saliency = {"class_path": "TimmSaliency", "init_args": {"model_name": "test_vit", "pretrained": False}}
    Path("saliency.yaml").write_text(
        json.dumps({"reducer": {"class_path": "HiRED", "init_args": {"attention": saliency}}})
    )
    assert run_json(capsys, *question, "--config", "saliency.yaml")["kept_per_tile"] == report["kept_per_tile"]
    assert main(["run", *arguments, "--print_config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert run_json(capsys, "--config", "printed.yaml")["reducer"] == report["reducer"]
    assert main(["run", *FAST, *arguments]) == 0
    assert "attention read: TimmSaliency(test_vit), 375.7 MFLOP" in capsys.readouterr().out


def test_a_full_budget_gives_the_same_answers(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--reducer.budget", "1.0")
    assert all(result["answer"] == result["answer_full"] for result in report["results"])
    assert report["kept"] == report["valid"] > 400


def test_images_and_questions_of_the_user(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    random_image(90, 200).convert("CMYK").save("a.jpg")
    random_image(300, 80).convert("LA").save("b.png")
    arguments = ["--image", "a.jpg", "b.png", "--question", "What number is on the star?", "How many shapes are there?"]
    report = run_json(capsys, *arguments, "--out", "deep/er")
    assert [(result["image"], result["question"][:4]) for result in report["results"]] == [
        ("a.jpg", "What"),
        ("a.jpg", "How "),
        ("b.png", "What"),
        ("b.png", "How "),
    ]
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["overlay-2.png", "overlay.png"]
    assert report["results"][0]["kept_per_tile"] != report["results"][2]["kept_per_tile"]


@pytest.mark.parametrize("size", [(1, 1), (12_000, 200), (200, 12_000), (3_000, 1)])
def test_extreme_images_work(capsys: pytest.CaptureFixture[str], size: tuple[int, int]) -> None:
    Image.new("RGB", size, "red").save("odd.png")
    report = run_json(capsys, "--image", "odd.png")
    assert 0 < report["kept"] <= report["asked"]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_checkpoint_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path / "checkpoint")
    tiny_processor(family).save_pretrained(tmp_path / "checkpoint")
    random_image(60, 150).save("a.png")
    report = run_json(capsys, "--model", "checkpoint", "--image", "a.png", "--reducer.budget", "0.5")
    assert report["kept"] == report["asked"] == (8 if family == "llava" else 32)


# --- configuring ------------------------------------------------------------------------------------------------------


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


def test_an_overlay_of_a_downsampled_image(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--reducer", "image-downsample")
    assert 0 < report["kept"] <= report["asked"]
    assert list(Path("tokenprune-out").iterdir())


# --- listing and help -------------------------------------------------------------------------------------------------


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for kind in ("strategies", "components", "models"):
        assert main(["list", kind]) == 0
        assert capsys.readouterr().out.strip()
        assert main(["list", kind, "--json"]) == 0
        rows[kind] = json.loads(capsys.readouterr().out)
    hired = next(row for row in rows["strategies"] if row["name"] == "HiRED")
    assert hired["presets"] == "HiRED.paper, HiRED.release"
    assert hired["needs"] == "cls_attention(feature), cls_attention(first)"
    kinds = {row["name"]: row["kind"] for row in rows["components"]}
    assert kinds["TopAttentionSelection"] == "selection"
    assert kinds["VisualContentAllocation"] == "allocation"
    assert {"internvl", "llava", "llava_next", "qwen2_vl"} <= {row["family"] for row in rows["models"]}


def test_list_of_plugins_and_as_markdown(capsys: pytest.CaptureFixture[str], strategy_file: Path) -> None:
    assert main(["list", "strategies", "--plugin", "loud.py", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["LoudestTokens"]["needs"] == "features"
    assert rows["HiRED"]["parity"] == "release(): 12/12 official cases"
    assert rows["VisionZip"]["dropped tokens"] == "merged"
    assert rows["ImageDownsample"]["stage"] == "image"
    assert main(["list", "strategies", "--markdown"]) == 0
    assert "| `HiRED` |" in capsys.readouterr().out
    Path("twice.py").write_text(STRATEGY_SOURCE.replace("LoudestTokens", "HiRED"))
    message = run_refused(capsys, "list", "strategies", "--plugin", "twice.py")
    assert "two classes are called HiRED" in message
    assert "two classes are called HiRED" in run_refused(capsys, "run", "--reducer", "twice.py:HiRED")
    assert "nowhere.py is no Python file" in run_refused(capsys, "list", "strategies", "--plugin", "nowhere.py")


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


def test_check(capsys: pytest.CaptureFixture[str], strategy_file: Path) -> None:
    assert main(["check", "hired", *SOME_FAMILIES, "--reducer.budget", "0.1"]) == 0
    assert "HiRED keeps all promises" in capsys.readouterr().out
    assert main(["check", "loud.py:LoudestTokens", *SOME_FAMILIES, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    Path("bad.py").write_text(STRATEGY_SOURCE.replace("image.features.float()", "image.features.mul_(2).float()"))
    assert main(["check", "bad.py:LoudestTokens", *SOME_FAMILIES]) == 1
    out = capsys.readouterr().out
    assert "FAIL inputs unchanged: reduced one tile: expected an unchanged image, got changed features" in out
    assert "LoudestTokens breaks a promise" in out
    assert "name the strategy" in run_refused(capsys, "check")
    assert "no strategy is called 'Hird'. Did you mean HiRED?" in run_refused(capsys, "check", "Hird")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tokenprune {__version__}\n"
    assert main(["--help"]) == 0
    assert "run" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["run", "--help"]) == 0
    assert "--reducer" in capsys.readouterr().out


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "no command 'frobnicate'; the commands are run, evaluate, ablate, report, sweep"),
        (["list", "things"], "'strategies', 'components', 'models'"),
        (["run", "--reducr", "HiRED"], "no option --reducr (did you mean --reducer?)"),
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
        (["run", "--reducer", "none.py:X"], "none.py is no Python file"),
        (["run", "--reducer", "broken.py:X"], "broken.py cannot be imported: ModuleNotFoundError"),
        (["run", "--reducer", "loud.py:Quiet"], "loud.py has no class 'Quiet'; it has LoudestTokens"),
        (["run", "--config", "none.yaml"], "File does not exist"),
        (["run", "--reducer.attention", "pooled"], "attention takes auto, cls, pooling, received or a component; no"),
        (
            ["run", "--reducer.attention", "TimmSaliency", "--reducer.attention.model", "x"],
            "there is no parameter 'model' of TimmSaliency (did you mean model_name?)",
        ),
        (["run", "--image", "none.png"], "none.png: no such file"),
        (["run", "--image", "loud.py"], "loud.py: not an image"),
        (["run", "--model", "./nothing"], "./nothing: no such folder; give `mini`, a checkpoint folder, or a hub id"),
        (["run", "--model", "."], "--model . cannot be loaded"),
        (["run", "--out", "loud.py"], "--out loud.py cannot be created as a folder"),
        (["run", "--device", "cuda:77"], "--device cuda:77 cannot be used"),
        (["run", "--dtype", "int9"], "--dtype int9 is no torch dtype"),
        (["run", "--max-new-tokens", "0"], "must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_error_is_one_line(
    capsys: pytest.CaptureFixture[str], strategy_file: Path, arguments: list[str], message: str
) -> None:
    Path("broken.py").write_text("import nothing_like_this")
    assert message in run_refused(capsys, *arguments)


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


def test_an_unwritable_overlay_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def fail(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert "tokenprune-out/overlay.png cannot be written: No space left on device" in run_refused(capsys, "run", *FAST)
    assert list(Path("tokenprune-out").iterdir()) == []


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


def test_mini_has_a_demo() -> None:
    assert mini.image_path().is_file()
    assert {"question", "answer", "type", "needs"} == set(mini.demo_questions()[0])


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


def test_check_on_some_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "HiRED", "--families", "llava_next"]) == 0
    assert "HiRED" in capsys.readouterr().out
    assert main(["check", "HiRED", "--families", "lava"]) == 2
    assert "no family is called lava" in capsys.readouterr().err
