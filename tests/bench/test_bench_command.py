"""The command `bench run`, its models and its configs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from research import truncation_steps as steps
from tokenprune.account import kv_bytes
from tokenprune.adapter import Adapter, find_adapter
from tokenprune.cli.main import main
from tokenprune.cli.options import build_parser, parse_options, select_fields
from tokenprune.experiments.bench.architectures import list_architectures
from tokenprune.experiments.bench.bench_model import (
    find_random_config,
    list_ordinary_ids,
    load_bench_model,
    random_image,
)
from tokenprune.experiments.bench.command import BenchConfig, build_reducers, list_release_budgets
from tokenprune.experiments.bench.image_processors import build_image_processor
from tokenprune.experiments.bench.measure import (
    PLAIN,
    BenchProtocol,
    Measurement,
    Variant,
    Workload,
    count_work,
    measure_variants,
)
from tokenprune.experiments.bench.phase_timer import PHASES
from tokenprune.experiments.bench.report import as_markdown, build_overview_tables, draw_phases, print_tables
from tokenprune.experiments.bench.results import as_data
from tokenprune.models.internvl import InternVLAdapter
from tokenprune.models.llava import LlavaAdapter
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.models.llava_onevision import LlavaOnevisionAdapter
from tokenprune.models.qwen2_5_vl import Qwen25VLAdapter
from tokenprune.models.qwen2_vl import Qwen2VLAdapter
from tokenprune.strategies import PixelPrune, Random, RandomPatches
from tokenprune.testing.examples import find_example


def test_steps_from_the_command_line(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model mini --size 80x160 --repeats 1 --device cpu --out steps.json"
    assert steps.main(arguments.split()) == 0
    out = capsys.readouterr().out
    assert "mini, HiRED at 20 %, 80x160 pixels, 1 rounds in turns" in out
    assert len([line for line in out.splitlines() if line.startswith("| ")]) == 2 + len(steps.STEPS)
    assert set(json.loads(Path("steps.json").read_text())["steps"]) == set(steps.STEPS)
    with pytest.raises(SystemExit):
        steps.main(["--model", "mini", "--size", "80"])
    assert "--size 80: give height x width in pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "adapter",
    [LlavaAdapter, LlavaNextAdapter, LlavaOnevisionAdapter, InternVLAdapter, Qwen2VLAdapter, Qwen25VLAdapter],
)
def test_architectures_run_without_weights(adapter: type[Adapter], tmp_path: Path) -> None:
    config = tmp_path / "small.json"
    config.write_text(json.dumps(find_example(adapter).build_model().config.to_dict()))
    bench_model = load_bench_model(str(config), "cpu", llm_layers=1, prompt_tokens=5)
    metadata = bench_model.as_data()
    assert (metadata["weights"], metadata["cut"]) == ("random", True)
    assert (metadata["llm_layers"], metadata["llm_layers_full"]) == (1, 2)
    inputs = bench_model.prepare([random_image((112, 56), seed) for seed in range(2)])
    assert not torch.equal(*(part.float() for part in inputs["pixel_values"].chunk(2)))
    measurement = Measurement(Variant("half", Random(0.5)))
    count_work(bench_model, inputs, measurement)
    assert measurement.flops is not None
    assert min(measurement.flops[name] for name in ("vision encode", "projector", "prefill", "decode")) > 0
    full = int(bench_model.adapter.placeholders(inputs)[0].sum())
    assert measurement.visual // 2 < full
    assert measurement.prompt == inputs["input_ids"].shape[1] - full + measurement.visual // 2
    assert measurement.kv_bytes == 2 * kv_bytes(bench_model.adapter.llm, measurement.prompt)


def test_strategies_before_and_inside_the_tower_of_one_sequence(tmp_path: Path) -> None:
    """The tower runs on about half of the patches; selecting by pixels belongs to the phase of the reducer."""
    config = tmp_path / "small.json"
    config.write_text(json.dumps(find_example(Qwen25VLAdapter).build_model().config.to_dict()))
    bench_model = load_bench_model(str(config), "cpu", prompt_tokens=5)
    reducers = {PLAIN: None, "pixels": PixelPrune(0.5), "both": PixelPrune(0.5) >> RandomPatches(0.5)}
    variants = [Variant(name, reducer) for name, reducer in reducers.items()]
    protocol, workload = BenchProtocol(tokens=2, repeats=1, warmup=0), Workload(1, (112, 112))
    data = as_data(measure_variants(bench_model, workload, variants, protocol), workload, protocol)
    plain, pixels, both = data["variants"]
    assert both["tower_patches_share"] < pixels["tower_patches_share"] == 0.5
    assert both["ratios"]["tower_flops_share"] < pixels["ratios"]["tower_flops_share"] < 1
    assert plain["phases_ms"]["reducer"]["median"] == 0 < pixels["phases_ms"]["reducer"]["median"]
    table = build_overview_tables(data)["vision tower"]
    assert table[2][:3] == ["pixels", "50.0", f"{100 * pixels['ratios']['tower_flops_share']:.1f}"]


def test_checkpoints_can_be_cut() -> None:
    full, cut = load_bench_model("mini", "cpu"), load_bench_model("mini", "cpu", attn="eager", llm_layers=1)
    assert (cut.layers, cut.full_layers) == (1, 3)
    assert cut.as_data()["attention"] == {"llm": "eager", "vision": "eager"}
    outcomes = [Measurement(Variant(PLAIN)), Measurement(Variant(PLAIN))]
    for bench_model, outcome in zip((full, cut), outcomes, strict=True):
        count_work(bench_model, bench_model.prepare([random_image((80, 160), 0)]), outcome)
    assert outcomes[0].kv_bytes == 3 * outcomes[1].kv_bytes
    assert outcomes[0].flops is not None and outcomes[1].flops is not None  # noqa: PT018
    assert outcomes[0].flops["vision encode"] == outcomes[1].flops["vision encode"]


def test_shipped_architectures_process_images() -> None:
    assert "llava-v1.6-vicuna-7b" in list_architectures()
    for name in list_architectures():
        config = find_random_config(name)
        pixels = build_image_processor(config)(images=[random_image((672, 672), 0)], return_tensors="pt")[
            "pixel_values"
        ]
        assert pixels.shape[-1] in (336, 384, 448, 3 * 2 * 14**2), name
        assert config.image_token_id not in list_ordinary_ids(config)


PLUGIN = '''
from dataclasses import dataclass
from torch import Tensor
from tokenprune import EncodedImage, ScoreReducer


@dataclass
class LoudestTokens(ScoreReducer):
    """Keep the tokens with the largest feature norm."""

    def score(self, image: EncodedImage) -> Tensor:
        print("scoring")
        return image.features.float().norm(dim=-1)
'''


def test_the_mini_model_end_to_end(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("loud.py").write_text(PLUGIN)
    reducers = ["--reducers", "hired", "loud.py:LoudestTokens", "ToMe(r=8)+HiRED(0.2)"]
    options = "--budget 0.2 --batches 1 2 --sizes 80x160 --tokens 3"
    more_options = "--repeats 2 --warmup 0 --threads 1 --device cpu --llm-layers 2 --json --quiet --out found"
    assert main(["bench", "run", *reducers, *options.split(), *more_options.split()]) == 0
    out, err = capsys.readouterr()
    assert err.replace("scoring\n", "") == ""
    result = json.loads(out)
    assert result == json.loads(Path("found/bench.json").read_text())
    assert set(result) == {"schema", "model", "environment", "protocol", "coverage", "omitted", "settings", "traces"}
    assert {"device", "device_name", "threads", "torch", "transformers", "tokenprune"} <= set(result["environment"])
    assert result["environment"]["threads"] == 1
    assert result["model"]["attention"] == {"llm": "sdpa", "vision": "sdpa"}
    assert (result["model"]["dtype"], result["model"]["cut"]) == ("float32", True)
    assert [(row["batch"], row["height"], row["width"]) for row in result["settings"]] == [(1, 80, 160), (2, 80, 160)]
    names = [PLAIN, "hired 20 %", "LoudestTokens 20 %", "ToMe(r=8)+HiRED(0.2)"]
    for setting in result["settings"]:
        assert [row["name"] for row in setting["variants"]] == names
        plain = setting["variants"][0]
        for row in setting["variants"]:
            assert set(row["phases_ms"]) == set(PHASES)
            summaries = [*row["phases_ms"].values(), *row["measures"].values()]
            assert all(set(samples) == {"median", "quartiles", "values"} for samples in summaries)
            assert all(len(samples["values"]) == 2 for samples in summaries)
            assert row["flops"]["to_first_token"] > 0
            assert row["kv_bytes"] > 0
        for row in setting["variants"][1:]:
            assert set(row["ratios"]) >= {
                "encode",
                "encode_prefill",
                "ttft",
                "own_share_of_vision_encode",
                "flops_to_first_token",
                "attained",
            }
            assert row["ratios"]["encode_prefill"]["coverage"] == 0.5
            assert 0 < row["flops"]["phases"]["vision encode"] < plain["flops"]["phases"]["vision encode"]
        assert [row["reducer"]["init_args"]["budget"] for row in setting["variants"][1:3]] == [0.2, 0.2]
        reduced, composed = setting["variants"][1], setting["variants"][3]
        flops = [row["flops"]["phases"]["vision encode"] for row in (composed, plain)]
        assert composed["ratios"]["tower_flops_share"] == flops[0] / flops[1] < reduced["ratios"]["tower_flops_share"]
        assert composed["tower_patches_share"] < 1
        assert reduced["tower_patches_share"] is None
        times = [[row["measures"]["encode_ms"]["values"][n] for row in (composed, plain)] for n in range(2)]
        shares = [variant / reference for variant, reference in times]
        assert composed["ratios"]["encode_time_share"]["median"] == pytest.approx(sum(shares) / 2)
        assert reduced["ratios"]["kv_bytes"] == plain["prompt_length"] / reduced["prompt_length"]
    assert result["traces"] == []
    assert Path("found/phases.png").read_bytes().startswith(b"\x89PNG")
    page = Path("found/bench.md").read_text()
    assert page == as_markdown(result)
    assert "CUT: 1 LLM layers are missing" in page
    assert "2 of 3 LLM layers" in page
    assert page.count("\n| hired 20 % |") == 6 * 2
    share = 100 * result["settings"][0]["variants"][3]["ratios"]["tower_flops_share"]
    assert f"| {share:.1f} |" in page.partition("vision tower:")[2].partition("\n\n")[2].partition("\n\n")[0]
    assert "| variant | dispatched operators |" in page
    assert "release-like" not in page.partition("## ")[2]
    figure = draw_phases(result)
    assert len(figure.axes) == 4
    machine = result["environment"]
    assert figure.get_suptitle() == f"{result['model']['name']} on {machine['device_name']} ({machine['device']})"
    narrow = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    print_tables(result, narrow)
    tables = narrow.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in tables
    assert all(phase in tables for phase in PHASES)
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    print_tables(result, console)
    tables = console.export_text()
    assert "medians and [quartiles]" in tables
    assert "batch 2, 80 x 160 pixels: encode and prefill" in tables


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sizes 672", "--sizes 672: give height x width in pixels"),
        ("--sizes 0x672", "--sizes 0x672: give height x width"),
        ("--budget 1.5", "--budget 1.5: give ratios above 0 and up to 1"),
        ("--budget 0", "--budget 0: give ratios"),
        ("--batches 0", "--batches 0: give at least 1"),
        ("--tokens 1", "--tokens 1: give at least 2"),
        ("--repeats 0", "--repeats 0: give at least 1"),
        ("--warmup -1", "--warmup -1: give at least 0"),
        ("--threads 0", "--threads 0: give at least 1"),
        ("--prompt-tokens 0", "--prompt-tokens 0: give at least 1"),
        ("--llm-layers 0", "--llm-layers 0: give at least 1"),
        ("--llm-layers 4", "--llm-layers 4: the LLM has only 3"),
        ("--reducers hird", "Did you mean HiRED"),
        ("--baseline published", "--baseline"),
        ("--attn fast", "--attn fast cannot be used"),
        ("--dtype float33", "--dtype float33 is no torch dtype"),
        ("--model nowhere", "--model nowhere: no such folder or architecture; give"),
        ("--model llava-v1.6-vicuna-7", "(did you mean llava-v1.6-vicuna-7b?)"),
        ("--model ./nowhere", "--model ./nowhere: no such folder"),
        ("--model nowhere.json", "--model nowhere.json cannot be read as a config"),
        ("--model list.json", "--model list.json cannot be read as a config"),
        ("--model bert.json", "cannot be prepared without its processor"),
        ("--repeat 3", "no option --repeat (did you mean --repeats?)"),
        ("--batches two", "--batches"),
    ],
)
def test_bad_arguments(arguments: str, message: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.json").write_text("[]")
    Path("bert.json").write_text(json.dumps({"model_type": "paligemma"}))
    assert main(["bench", "run", "--device", "cpu", "--quiet", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not Path("tokenprune-bench").exists()


@pytest.mark.slow
def test_compiled_variants_are_measured_without_counts(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--budget 1.0 0.2 --batches 1 2 --sizes 80x160 --tokens 3 --repeats 2 --warmup 0 --threads 1"
    assert main(["bench", "run", *options.split(), "--device", "cpu", "--compile", "true", "--json", "--quiet"]) == 0
    for setting in json.loads(capsys.readouterr().out)["settings"]:
        variants = {row["name"]: row for row in setting["variants"]}
        assert list(variants) == [PLAIN, "HiRED 100 %", "HiRED 20 %", "HiRED 20 % compiled"]
        reduced, compiled = variants["HiRED 20 %"], variants["HiRED 20 % compiled"]
        assert compiled["flops"] is compiled["launches"] is None
        assert compiled["prompt_length"] == reduced["prompt_length"]
        assert compiled["phases_ms"]["vision encode"]["median"] > 0 < compiled["phases_ms"]["prefill"]["median"]
    page = Path("tokenprune-bench/bench.md").read_text()
    assert "GFLOP" in page
    assert "HiRED 20 % compiled" in page


def test_unsupported_strategies_raise_before_the_benchmark(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = find_example(Qwen2VLAdapter).build_model().config.to_dict()
    Path("qwen.json").write_text(json.dumps(config))
    assert main(["bench", "run", "--model", "qwen.json", "--device", "cpu", "--reducers", "ImageDownsample"]) == 2
    assert "ImageDownsample 100 % needs resolution" in capsys.readouterr().err


def test_the_baseline_is_compared_at_each_budget(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--baseline release --budget 100% 0.2 5% --sizes 80x160 --tokens 3 --repeats 2 --warmup 0 --threads 1"
    assert main(["bench", "run", *options.split(), "--device", "cpu", "--count", "false", "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    variants = {row["name"]: row for row in result["settings"][0]["variants"]}
    assert list(variants) == [PLAIN, *(f"{name} {budget}" for name, budget in NAMES_AND_BUDGETS)]
    references = {name: row["release_ratios"]["reference"] for name, row in variants.items() if "release_ratios" in row}
    assert references == {f"HiRED {budget}": f"release-like {budget}" for budget in ("20 %", "5 %")}
    baseline, reduced = variants["release-like 20 %"], variants["HiRED 20 %"]
    times = [row["measures"]["encode_prefill_ms"]["values"] for row in (baseline, reduced)]
    ratios = sorted(reference / value for reference, value in zip(*times, strict=True))
    assert reduced["release_ratios"]["encode_prefill"]["interval"] == pytest.approx([ratios[0], ratios[-1]])
    assert baseline["phases_ms"]["reducer"]["median"] > 0 < baseline["phases_ms"]["rewrite"]["median"]
    assert baseline["phases_ms"]["packing"]["median"] == baseline["phases_ms"]["signal capture"]["median"] == 0
    # Nothing was counted, so nothing is shown.
    assert all((row["flops"], row["launches"]) == (None, None) for row in variants.values())
    assert all("tensors" not in row["memory"] and row["kv_bytes"] > 0 for row in variants.values())
    assert variants["HiRED 20 %"]["ratios"]["attained"] is None
    page = Path("tokenprune-bench/bench.md").read_text()
    assert page.count("speed-up over release-like") == 3
    assert "GFLOP" not in page
    assert "dispatched operators" not in page


NAMES_AND_BUDGETS = [
    ("release-like", "20 %"),
    ("release-like", "5 %"),
    ("HiRED", "100 %"),
    ("HiRED", "20 %"),
    ("HiRED", "5 %"),
]


def test_the_baseline_is_compared_at_numbers_of_tokens_and_budgets_of_calls(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--baseline release --budget 60 --sizes 80x160 --tokens 2 --repeats 1 --warmup 0 --threads 1 --count false"
    )
    command = ["bench", "run", *options.split(), "--reducers", "HiRED", "HiRED(0.3)", "--device", "cpu"]
    assert main([*command, "--json", "--quiet"]) == 0
    variants = json.loads(capsys.readouterr().out)["settings"][0]["variants"]
    assert {row["name"]: row.get("release_ratios", {}).get("reference") for row in variants} == {
        PLAIN: None,
        "release-like 60 tokens": None,
        "release-like 30 %": None,
        "HiRED 60 tokens": "release-like 60 tokens",
        "HiRED(0.3)": "release-like 30 %",
    }
    assert variants[1]["visual_tokens"] == 60


def test_a_model_without_the_baseline_is_named(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = find_example(Qwen2VLAdapter).build_model().config.to_dict()
    Path("qwen.json").write_text(json.dumps(config))
    options = ["--model", "qwen.json", "--device", "cpu", "--reducers", "Random", "--quiet"]
    assert main(["bench", "run", "--baseline", "release", *options]) == 2
    message = "the release-like baseline cannot run qwen2_vl with this vision tower: it requires a CLS token"
    assert f"--baseline release: {message}" in capsys.readouterr().err
    adapter = find_adapter(find_example(Qwen2VLAdapter).build_model())
    budgets, omitted = list_release_budgets(BenchConfig(), [], adapter, torch.device("cuda"))
    assert budgets == []
    assert omitted is not None
    assert omitted.startswith(message)
    # By default, the CPU measures no baseline, so nothing is omitted.
    assert list_release_budgets(BenchConfig(), [], adapter, torch.device("cpu")) == ([], None)


def test_the_baseline_is_a_default_on_cuda(model: Any) -> None:
    adapter, config = find_adapter(model), BenchConfig(budget=[1.0, "20%", 0.2, 0.05, 1, 160])
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    budgets, omitted = list_release_budgets(config, [], adapter, cuda)
    assert [repr(budget) for budget in budgets] == ["0.2", "0.05", "1", "160"]
    assert omitted is None
    assert list_release_budgets(config, [], adapter, cpu) == ([], None)
    assert list_release_budgets(replace(config, baseline="none"), [], adapter, cuda) == ([], None)


def test_the_baseline_has_the_budgets_of_calls(model: Any) -> None:
    calls = ["HiRED(0.2)", "HiRED(64)", "HiRED(1.0)", "FasterVLM(0.1)", "ToMe(r=2)+HiRED(0.3)", "FastV(budget=0.5)"]
    reducers, config = build_reducers(calls, [0.2], []), BenchConfig(reducers=calls, budget=[0.2])
    budgets, _ = list_release_budgets(config, reducers, find_adapter(model), torch.device("cuda"))
    assert budgets == [0.2, 64, 0.1]


def test_the_command_run_precedes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--repeats", "1", "run"]) == 2
    assert "name the benchmark before its options: tokenprune bench run" in capsys.readouterr().err


def test_shipped_configs_are_valid(in_empty_folder: Path) -> None:
    files = sorted((Path(__file__).parents[2] / "experiments/configs/bench").glob("*.yaml"))
    assert files
    for file in files:
        first = file.read_text().splitlines()[0]
        assert first.startswith(f"# tokenprune bench run --config experiments/configs/bench/{file.name}")
        parser = build_parser("tokenprune bench run", "", BenchConfig, file=True)
        config = select_fields(BenchConfig, parse_options(parser, ["--config", str(file)]))
        assert config.budget
