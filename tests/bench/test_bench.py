"""`tokenprune bench run`: phases, FLOPs and memory of complete models, with variants measured in alternation."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from research import truncation_steps as steps
from tokenprune.account import kv_bytes
from tokenprune.adapter import Adapter, find_adapter
from tokenprune.capabilities import Resizable
from tokenprune.cli.main import main
from tokenprune.experiments.bench.architectures import list_architectures
from tokenprune.experiments.bench.bench_model import (
    BenchModel,
    build_image_processor,
    find_random_config,
    list_ordinary_ids,
    load_bench_model,
    random_image,
)
from tokenprune.experiments.bench.command import build_bench_parser
from tokenprune.experiments.bench.environment import peak_memory
from tokenprune.experiments.bench.flame import Bar, build_flame_graph, draw_flame_graphs, profile_variants
from tokenprune.experiments.bench.measure import (
    FUSED_ATTENTION,
    PLAIN,
    SDPA_ON_CPU,
    BenchProtocol,
    Measurement,
    Variant,
    Workload,
    as_data,
    count_work,
    create_flop_counter,
    generate_once,
    measure_variants,
    round_order,
)
from tokenprune.experiments.bench.phase_timer import (
    ADAPTER_PHASES,
    DECODE,
    FIRST_TOKEN_PHASES,
    PHASES,
    PhaseTimer,
    instrument,
)
from tokenprune.experiments.bench.report import as_markdown, draw_phases, print_tables
from tokenprune.experiments.bench.samples import Ratio, Samples, interval_rank
from tokenprune.image import EncodedImage
from tokenprune.models._capture.hooks import CAPTURE_CONTEXT, CAPTURE_KERNEL
from tokenprune.models.internvl import InternVLAdapter
from tokenprune.models.llava import LlavaAdapter
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.models.llava_onevision import LlavaOnevisionAdapter
from tokenprune.models.qwen2_5_vl import Qwen25VLAdapter
from tokenprune.models.qwen2_vl import Qwen2VLAdapter
from tokenprune.pipeline import Pipeline
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED, Random
from tokenprune.testing.examples import find_example
from tokenprune.testing.tiny_models import batch, tiny_model

SIZES = [[(112, 56)], [(112, 56)]]
SETTING = Workload(2, (112, 56))


class ManualClock:
    """A clock that advances only by calls of `advance`."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def advance(self, ticks: float) -> None:
        self.time += ticks


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llava_next")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return dict(batch("llava_next", *SIZES))


@pytest.fixture
def tiny(model: Any, inputs: dict[str, Any]) -> BenchModel:
    adapter = find_adapter(model)
    return BenchModel("tiny", model, adapter, "random", 2, 2, lambda images: inputs)


# --- phases -----------------------------------------------------------------------------------------------------------


def test_the_time_of_a_phase_excludes_inner_phases() -> None:
    clock = ManualClock()
    timer = PhaseTimer(clock)
    clock.advance(1)
    with timer.phase("rewrite"):
        clock.advance(10)
        with timer.phase("reducer"):
            clock.advance(100)
            with timer.phase("reducer"):
                clock.advance(100)
        with suppress(KeyError), timer.phase("vision encode"):
            clock.advance(1000)
            raise KeyError
        clock.advance(10)
    timer.start_decoding()
    clock.advance(5)
    timer.flush()
    assert timer.spent == {"generate": 1, "rewrite": 20, "reducer": 200, "vision encode": 1000, "decode": 5}
    assert sum(timer.spent.values()) == clock.time


@dataclass
class SlowHiRED(HiRED):
    """HiRED that advances a clock by 1,000 ticks per image."""

    clock: Any = field(default=None, kw_only=True)

    def select(self, image: EncodedImage) -> Selection:
        self.clock.advance(1000)
        return super().select(image)


@pytest.mark.parametrize("reduced", [False, True])
def test_phases_cover_the_call(tiny: BenchModel, inputs: Any, reduced: bool) -> None:
    """Each phase advances the clock by a different amount; the sum over the phases is the time of the call."""
    clock, base, hooks = ManualClock(), tiny.model.base_model, []
    for module, ticks in (
        (base.vision_tower.embeddings, 100),
        (base.multi_modal_projector.act, 10),
        (base.language_model.norm, 7),
    ):
        hooks.append(module.register_forward_hook(lambda *_, ticks=ticks: clock.advance(ticks)))
    try:
        variant = Variant("slow", SlowHiRED(0.3, clock=clock)) if reduced else Variant(PLAIN)
        total, first, timer, _ = generate_once(tiny, inputs, variant, 4, clock, lambda: PhaseTimer(clock))
    finally:
        for hook in hooks:
            hook.remove()
    assert timer is not None
    spent = {name: ticks for name, ticks in timer.spent.items() if ticks}
    expected = {"vision encode": 100, "projector": 10, "prefill": 7, "decode": 21}
    assert spent == (expected | {"reducer": 2000} if reduced else expected)  # two images
    assert total == sum(spent.values())
    assert first == total - 21


def test_capture_is_counted_separately_from_the_kernel(tiny: BenchModel, inputs: Any) -> None:
    reduced = Measurement(Variant("HiRED", HiRED(0.3)))
    count_work(tiny, inputs, reduced)
    plain = Measurement(Variant(PLAIN))
    count_work(tiny, inputs, plain)
    # Three of four layers are required. All patches of the six tiles are embedded: 16 per tile, of 3 x 14 x 14 values.
    config = tiny.model.config.vision_config
    embedding = 2 * 6 * 16 * 3 * 14**2 * config.hidden_size
    saved = plain.flops["vision encode"] - reduced.flops["vision encode"]
    assert config.num_hidden_layers * saved == plain.flops["vision encode"] - embedding
    # Two layers, one query for each head of a tile, 17 keys of width 8, two FLOPs per multiply-add.
    assert reduced.flops["signal capture"] == 2 * (6 + 6) * 4 * 17 * 8


def model_state(model: Any) -> list[Any]:
    return [
        [sorted(vars(module)) for module in model.modules()],
        ALL_ATTENTION_FUNCTIONS[CAPTURE_KERNEL],
        CAPTURE_CONTEXT.get(),
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    ]


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_instruments_do_not_change_results_and_are_removed(tiny: BenchModel, inputs: Any) -> None:
    before = model_state(tiny.model)
    attachment = HiRED(0.3)(tiny.model)
    with torch.inference_mode(), attachment:
        pipeline = attachment.pipeline
        assert pipeline is not None
        expected = tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        adapter = pipeline.adapter
        objects = (pipeline, pipeline.reducer, adapter)
        vars_before = [sorted(vars(instance)) for instance in objects]
        with instrument(adapter, PhaseTimer(ManualClock()), pipeline):
            answer = tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with (
            pytest.raises(ValueError, match="image_sizes as a tensor of shape"),
            instrument(adapter, PhaseTimer(ManualClock()), pipeline),
        ):
            tiny.model.generate(**inputs | {"pixel_values": inputs["pixel_values"][:1]})
        for module in (adapter.tower_layers[1].mlp, adapter.projector):  # in the tower, and after the tower
            hook, timer = module.register_forward_pre_hook(interrupt), PhaseTimer(ManualClock())
            with pytest.raises(KeyboardInterrupt), instrument(adapter, timer, pipeline):
                tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False)
            hook.remove()
            assert not timer.is_decoding
            assert timer._open == ["generate"]
        assert [sorted(vars(instance)) for instance in objects] == vars_before
    assert torch.equal(expected, answer)
    assert model_state(tiny.model) == before


def test_a_renamed_method_of_an_adapter_is_noticed(tiny: BenchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its phase would be empty."""
    monkeypatch.setitem(ADAPTER_PHASES, Resizable, {"encode_smaller": "packing"})
    before, pipeline = model_state(tiny.model), Pipeline(HiRED(0.3), tiny.adapter)
    timer = PhaseTimer(ManualClock())
    with pytest.raises(AttributeError, match="encode_smaller"), instrument(tiny.adapter, timer, pipeline):
        pass
    assert model_state(tiny.model) == before


# --- FLOPs and the cache ----------------------------------------------------------------------------------------------


def test_flops_at_100_percent_equal_the_plain_call(tiny: BenchModel, inputs: Any) -> None:
    with torch.inference_mode(), create_flop_counter() as counter:
        tiny.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    plain, full = Measurement(Variant(PLAIN)), Measurement(Variant("HiRED 100 %", HiRED(1.0)))
    count_work(tiny, inputs, plain)
    count_work(tiny, inputs, full)
    assert sum(plain.flops.values()) == counter.get_total_flops()
    capture = full.flops.pop("signal capture")
    # At 100 %, the output object has the outputs of all layers.
    assert {name: flops for name, flops in full.flops.items() if flops} == {
        name: flops for name, flops in plain.flops.items() if flops
    }
    assert 0 < capture < 0.01 * sum(plain.flops.values())
    assert set(plain.operators) >= {str(SDPA_ON_CPU), "aten.mm", "aten.addmm"}
    assert sum(plain.operators.values()) == sum(plain.flops.values())


def test_attention_on_a_cpu_is_counted_as_matrix_products() -> None:
    """The counter of torch omits the attention kernel of CPUs, and counts eager attention as matrix products.

    Eager attention also computes the masked products that causal attention skips.
    """

    def flops(attn: str, counter: FlopCounterMode) -> int:
        with torch.inference_mode(), counter:
            tiny_model("llava_next", attn)(**inputs)
        return counter.get_total_flops()

    inputs = dict(batch("llava_next", SIZES[0]))
    config, length = tiny_model("llava_next").config.text_config, inputs["input_ids"].shape[1]
    skipped = 4 * config.num_hidden_layers * config.hidden_size * length * (length - 1) // 2
    assert flops("sdpa", create_flop_counter()) == flops("eager", FlopCounterMode(display=False)) - skipped
    assert flops("sdpa", FlopCounterMode(display=False)) < flops("sdpa", create_flop_counter())


def test_causal_attention_is_counted_up_to_the_diagonal() -> None:
    """With as many keys as queries, more, and fewer; a mask tensor skips no products."""

    def flops(queries: int, keys: int, **options: Any) -> int:
        query, key = torch.ones(1, 2, queries, 4), torch.ones(1, 2, keys, 4)
        with create_flop_counter() as counter:
            F.scaled_dot_product_attention(query, key, key, **options)
        return counter.get_total_flops() // (4 * 2 * 4)

    assert flops(5, 5) == 25
    assert flops(5, 5, is_causal=True) == 15
    assert flops(2, 5, is_causal=True) == 3
    assert flops(5, 2, is_causal=True) == 9
    assert flops(5, 5, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril()) == 25


def test_the_positions_of_the_causal_flag_match_the_kernels() -> None:
    for kernel, position in FUSED_ATTENTION.items():
        assert kernel.default._schema.arguments[position].name == "is_causal"


@pytest.mark.parametrize("budget", [None, 0.3])
def test_cache_and_tokens_equal_the_account(tiny: BenchModel, inputs: Any, budget: float | None) -> None:
    measurement = Measurement(Variant("one", None if budget is None else HiRED(budget)))
    count_work(tiny, inputs, measurement)
    with torch.inference_mode(), HiRED(budget or 1.0)(tiny.model) as run:
        tiny.model(**inputs)
    assert measurement.visual == sum(image.kept + image.newlines for image in run.account.images)
    longest = max(after for _, after in run.account.prompt_lengths)
    assert measurement.prompt == longest
    assert (longest < inputs["input_ids"].shape[1]) == (budget is not None)
    assert measurement.kv_bytes == 2 * kv_bytes(tiny.adapter.llm, longest)


def test_peak_memory_includes_freed_tensors() -> None:
    with peak_memory(torch.device("cpu")) as memory:
        torch.ones(64, 1024, 1024).sum()
    if not memory:
        pytest.skip("this system does not report the peak memory")
    assert memory["resident"] - memory["resident_before"] > 200e6


# --- order and numbers ------------------------------------------------------------------------------------------------


def test_the_order_of_variants_is_balanced() -> None:
    rounds = [round_order("abc", number) for number in range(6)]
    assert Counter(order[0] for order in rounds) == {"a": 2, "b": 2, "c": 2}
    assert Counter(pair for order in rounds for pair in (tuple(order[:2]), tuple(order[1:]))).total() == 12
    for first, second in ("ab", "ac", "bc"):
        assert sum(order.index(first) < order.index(second) for order in rounds) == 3
    assert round_order("a", 5) == ["a"]


CALLS: list[str] = []


@dataclass
class LoggedRandom(Random):
    """Random that appends its label to `CALLS`, or raises an out-of-memory error if the label is "greedy"."""

    label: str = "noted"

    def select(self, image: EncodedImage) -> Selection:
        if self.label == "greedy":
            raise torch.OutOfMemoryError("no room")
        CALLS.append(self.label)
        return super().select(image)


def test_variants_alternate_and_out_of_memory_is_recorded(tiny: BenchModel) -> None:
    CALLS.clear()
    labels = ("one", "two", "greedy")
    variants = [Variant(PLAIN), *(Variant(label, LoggedRandom(0.3, label=label)) for label in labels)]
    outcomes = measure_variants(tiny, SETTING, variants, BenchProtocol(tokens=2, repeats=3, warmup=1))
    timed = CALLS[4 * 2 :: 2]  # two images per call; two calls of each variant for FLOPs and memory
    orders = [
        [variant.name for variant in round_order(variants, number) if variant.name in ("one", "two")]
        for number in (0, 0, 1, 2)
    ]
    assert timed == [label for order in orders for label in order]
    assert [outcome.error for outcome in outcomes] == [None, None, None, "out of memory"]
    assert [len(outcome.call_seconds) for outcome in outcomes] == [3, 3, 3, 0]
    for outcome in outcomes[:3]:
        assert set(outcome.phases) == set(PHASES)
        for number, total in enumerate(outcome.call_seconds):
            covered = sum(outcome.phases[name][number] for name in (*FIRST_TOKEN_PHASES, DECODE))
            assert covered == pytest.approx(total, rel=0.05)
    data = as_data(outcomes, SETTING, BenchProtocol(tokens=2, repeats=3))
    assert [row["error"] for row in data["variants"]] == [None, None, None, "out of memory"]
    assert "ratios" not in data["variants"][0]
    reduced, plain = (outcomes[number].phases for number in (1, 0))
    shares = [
        sum(reduced[name][number] for name in ("signal capture", "reducer", "rewrite")) / plain["vision encode"][number]
        for number in range(3)
    ]
    share = data["variants"][1]["ratios"]["own_share_of_vision_encode"]
    assert share["median"] == pytest.approx(sorted(shares)[1])


def test_traces_show_the_phases(tiny: BenchModel, tmp_path: Path) -> None:
    files = profile_variants(
        tiny, SETTING, [Variant(PLAIN), Variant("HiRED 30 %", HiRED(0.3))], tmp_path / "trace", "tiny"
    )
    name = "batch-2-112-x-56-pixels"
    assert [file.name for file in files[2:]] == [f"{name}-HiRED-30.json", f"{name}-HiRED-30.txt", f"{name}.png"]
    ranges = {entry["name"] for entry in json.loads(files[2].read_text())["traceEvents"]}
    assert {name for name in ranges if name.startswith("phase: ")} == {
        f"phase: {name}" for name in FIRST_TOKEN_PHASES if name not in ("generate", "packing")
    }
    assert "aten::addmm" in files[1].read_text()
    graph = build_flame_graph(json.loads(files[2].read_text())["traceEvents"])
    assert set(graph.children) == {name for name in FIRST_TOKEN_PHASES if name != "packing"}
    tower, parts = graph.children["vision encode"], ("CLIPVisionModel", "CLIPEncoder", "CLIPEncoderLayer")
    while "CLIPMLP" not in tower.children:
        tower = next(part for name, part in tower.children.items() if name in parts)
    assert "CLIPAttention" in tower.children
    assert {"Linear", "QuickGELUActivation"} == set(tower.children["CLIPMLP"].children)
    # The tower runs inside the capture, but is another phase.
    assert "CLIPMLP" not in graph.children["signal capture"].children
    with Image.open(files[4]) as figure:
        assert figure.width > 1000


def event(kind: str, name: str, start: float, length: float) -> dict[str, Any]:
    return {"cat": kind, "name": name, "ts": start, "dur": length, "ph": "X"}


def test_a_flame_graph_gives_time_to_the_innermost_phase() -> None:
    """Rewriting takes 100 ms, with 60 ms of the tower and 10 ms of capture inside; prefill and decoding follow."""
    graph = build_flame_graph(
        [
            event("user_annotation", "phase: rewrite", 0, 100e3),
            event("python_function", "nn.Module: Tower_0", 10e3, 60e3),
            event("user_annotation", "phase: vision encode", 10e3, 60e3),
            event("python_function", "nn.Module: Layer_0", 11e3, 20e3),
            event("python_function", "nn.Module: Layer_1", 31e3, 30e3),
            event("cpu_op", "aten::conv2d", 31e3, 12e3),
            event("cpu_op", "aten::addmm", 32e3, 10e3),  # inside conv2d
            event("cpu_op", "aten::layer", 43.5e3, 0.2e3),  # while the module is called
            event("cpu_op", "aten::mul", 43.6e3, 0.1e3),
            event("python_function", "attend.py(3): attend", 44e3, 16e3),  # not drawn
            event("user_annotation", "phase: signal capture", 45e3, 10e3),
            event("cpu_op", "aten::matmul", 46e3, 4e3),
            event("user_annotation", "phase: prefill", 120e3, 50e3),
            event("cpu_op", "aten::mm", 130e3, 40e3),
            event("cpu_op", "aten::mm", 180e3, 40e3),
        ]
    )
    convolution, matmul, mm = Bar("conv2d", 12.0), Bar("matmul", 4.0), Bar("mm", 40.0)
    tower = Bar("vision encode", 50.0, {"Layer": Bar("Layer", 40.0, {"conv2d": convolution})})
    capture, prefill = Bar("signal capture", 10.0, {"matmul": matmul}), Bar("prefill", 50.0, {"mm": mm})
    assert graph.milliseconds == pytest.approx(150)
    phases = {name: bar for name, bar in graph.children.items() if name != "rewrite"}
    assert phases == {"vision encode": tower, "signal capture": capture, "prefill": prefill}
    assert graph.children["rewrite"].milliseconds == pytest.approx(40)


def test_an_empty_flame_graph_is_drawn() -> None:
    assert build_flame_graph([]) == Bar("")
    draw_flame_graphs({"a": Bar("", 1.0, {"prefill": Bar("prefill", 1.0)})}, "what ran")


def test_each_truncation_step_requires_fewer_flops(tiny: BenchModel) -> None:
    measured = steps.measure_steps(tiny, (112, 56), 0.3, 2, lambda text: None)
    flops = [sum(step.flops.values()) for step in measured.values()]
    capture = measured["selected afterwards"].flops["signal capture"]
    assert flops[1] == flops[0] + capture  # the plain model and the captured attention
    assert flops[1] > flops[2] > flops[3]
    assert measured["selected afterwards"].flops["projector"] == measured["required layers"].flops["projector"]
    encode_flops = [measured[name].flops["vision encode"] for name in ("required layers", "projector on kept tokens")]
    assert encode_flops[0] == encode_flops[1]
    data = steps.as_data(measured)
    assert data["plain"]["of_plain"] == {"median": 1.0, "interval": [1.0, 1.0], "coverage": 0.5}
    assert all(len(step["ms"]["values"]) == 2 for step in data.values())


def test_steps_from_the_command_line(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model mini --size 80x160 --repeats 1 --device cpu --out steps.json"
    assert steps.main(arguments.split()) == 0
    out = capsys.readouterr().out
    assert "mini, HiRED at 20 %, 80x160 pixels, 1 rounds in turns" in out
    assert len([line for line in out.splitlines() if line.startswith("| ")]) == 2 + len(steps.STEPS)
    assert set(json.loads(Path("steps.json").read_text())["steps"]) == set(steps.STEPS)
    with pytest.raises(SystemExit):
        steps.main(["--model", "mini", "--size", "80"])
    assert "--size 80: give height x width in pixels" in capsys.readouterr().err


def test_intervals_have_their_coverage() -> None:
    assert interval_rank(1) == (0, 0.0)
    assert interval_rank(5) == (0, 0.9375)
    assert interval_rank(6) == (0, 0.96875)
    assert interval_rank(9) == (1, 1 - 2 * 10 / 512)
    ratio = Ratio.of([2.0, 4.0, 9.0], [1.0, 1.0, 3.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.coverage) == (3.0, 2.0, 4.0, 0.75)
    assert Samples((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles == (2.0, 4.0)


def test_the_coverage_of_an_interval_is_its_frequency() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.empty(4000, 9).exponential_(generator=generator).sort(dim=1).values
    rank, coverage = interval_rank(9)
    inside = (draws[:, rank] < 0.6931) & (draws[:, -1 - rank] > 0.6931)
    assert float(inside.float().mean()) == pytest.approx(coverage, abs=0.012)


# --- models -----------------------------------------------------------------------------------------------------------


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
    assert min(measurement.flops[name] for name in ("vision encode", "projector", "prefill", "decode")) > 0
    full = int(bench_model.adapter.placeholders(inputs)[0].sum())
    assert measurement.visual // 2 < full
    assert measurement.prompt == inputs["input_ids"].shape[1] - full + measurement.visual // 2
    assert measurement.kv_bytes == 2 * kv_bytes(bench_model.adapter.llm, measurement.prompt)


def test_checkpoints_can_be_cut() -> None:
    full, cut = load_bench_model("mini", "cpu"), load_bench_model("mini", "cpu", attn="eager", llm_layers=1)
    assert (cut.layers, cut.full_layers) == (1, 3)
    assert cut.as_data()["attention"] == {"llm": "eager", "vision": "eager"}
    outcomes = [Measurement(Variant(PLAIN)), Measurement(Variant(PLAIN))]
    for bench_model, outcome in zip((full, cut), outcomes, strict=True):
        count_work(bench_model, bench_model.prepare([random_image((80, 160), 0)]), outcome)
    assert outcomes[0].kv_bytes == 3 * outcomes[1].kv_bytes
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


# --- the command ------------------------------------------------------------------------------------------------------

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


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_mini_model_end_to_end(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("loud.py").write_text(PLUGIN)
    options = "--reducers hired loud.py:LoudestTokens --budgets 0.2 --batches 1 2 --sizes 80x160 --tokens 3"
    more_options = "--repeats 2 --warmup 0 --threads 1 --device cpu --llm-layers 2 --json --quiet --out found"
    assert main(["bench", "run", *options.split(), *more_options.split()]) == 0
    out, err = capsys.readouterr()
    assert err.replace("scoring\n", "") == ""
    result = json.loads(out)
    assert result == json.loads(Path("found/bench.json").read_text())
    assert set(result) == {"schema", "model", "environment", "protocol", "coverage", "settings", "traces"}
    assert {"device", "device_name", "threads", "torch", "transformers", "tokenprune"} <= set(result["environment"])
    assert result["environment"]["threads"] == 1
    assert result["model"]["attention"] == {"llm": "sdpa", "vision": "sdpa"}
    assert (result["model"]["dtype"], result["model"]["cut"]) == ("float32", True)
    assert [(row["batch"], row["height"], row["width"]) for row in result["settings"]] == [(1, 80, 160), (2, 80, 160)]
    names = [PLAIN, "hired 20 %", "LoudestTokens 20 %"]
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
            assert row["reducer"]["init_args"]["budget"] == 0.2
            assert 0 < row["flops"]["phases"]["vision encode"] < plain["flops"]["phases"]["vision encode"]
        reduced = setting["variants"][1]
        assert reduced["ratios"]["kv_bytes"] == plain["prompt_length"] / reduced["prompt_length"]
    assert result["traces"] == []
    assert Path("found/phases.png").read_bytes().startswith(b"\x89PNG")
    page = Path("found/bench.md").read_text()
    assert page == as_markdown(result)
    assert "CUT: 1 LLM layers are missing" in page
    assert "2 of 3 LLM layers" in page
    assert page.count("\n| hired 20 % |") == 4 * 2
    figure = draw_phases(result)
    assert len(figure.axes) == 4
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
        ("--budgets 1.5", "--budgets 1.5: give ratios above 0 and up to 1"),
        ("--budgets 0", "--budgets 0: give ratios"),
        ("--batches 0", "--batches 0: give at least 1"),
        ("--tokens 1", "--tokens 1: give at least 2"),
        ("--repeats 0", "--repeats 0: give at least 1"),
        ("--warmup -1", "--warmup -1: give at least 0"),
        ("--threads 0", "--threads 0: give at least 1"),
        ("--prompt-tokens 0", "--prompt-tokens 0: give at least 1"),
        ("--llm-layers 0", "--llm-layers 0: give at least 1"),
        ("--llm-layers 4", "--llm-layers 4: the LLM has only 3"),
        ("--reducers hird", "Did you mean HiRED"),
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
def test_bad_arguments(arguments: str, message: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.json").write_text("[]")
    Path("bert.json").write_text(json.dumps({"model_type": "paligemma"}))
    assert main(["bench", "run", "--device", "cpu", "--quiet", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not Path("tokenprune-bench").exists()


def test_unsupported_strategies_raise_before_the_benchmark(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = find_example(Qwen2VLAdapter).build_model().config.to_dict()
    Path("qwen.json").write_text(json.dumps(config))
    assert main(["bench", "run", "--model", "qwen.json", "--device", "cpu", "--reducers", "ImageDownsample"]) == 2
    assert "ImageDownsample 100 % needs resolution" in capsys.readouterr().err


def test_the_command_run_precedes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--repeats", "1", "run"]) == 2
    assert "write `run` before its options" in capsys.readouterr().err


def test_shipped_configs_are_valid(in_folder: Path) -> None:
    files = sorted((Path(__file__).parents[2] / "experiments/configs/bench").glob("*.yaml"))
    assert files
    for file in files:
        first = file.read_text().splitlines()[0]
        assert first.startswith(f"# tokenprune bench run --config experiments/configs/bench/{file.name}")
        config = build_bench_parser().parse_args(["--config", str(file)])
        assert config.budgets
