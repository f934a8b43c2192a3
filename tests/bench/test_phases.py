"""Phases of a call: their times, traces and flame graphs, and instruments that change no result."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers.bench import SETTING, ManualClock
from tokenprune.capabilities import Resizable
from tokenprune.decoder_reducer import AtLayer
from tokenprune.experiments.bench.bench_model import BenchModel
from tokenprune.experiments.bench.flame import Bar, build_flame_graph, draw_flame_graphs, profile_variants
from tokenprune.experiments.bench.launches import OperatorCounter
from tokenprune.experiments.bench.measure import (
    PLAIN,
    Measurement,
    Variant,
    count_work,
    generate_once,
    time_phases,
)
from tokenprune.experiments.bench.phase_timer import ADAPTER_PHASES, DECODE, FIRST_TOKEN_PHASES, PhaseTimer, instrument
from tokenprune.image import EncodedImage
from tokenprune.models._capture.hooks import CAPTURE_CONTEXT, CAPTURE_KERNEL
from tokenprune.pipeline import Pipeline
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED


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
    """HiRED that advances a clock by 1,000 ticks per selection."""

    clock: Any = field(default=None, kw_only=True)

    def select(self, image: EncodedImage) -> Selection:
        self.clock.advance(1000)
        return super().select(image)


def test_selection_at_a_cut_belongs_to_the_reducer(tiny: BenchModel, inputs: Any) -> None:
    """Without a strategy before the LLM, only the cut selects tokens; its time is no part of the prefill."""
    clock = ManualClock()
    timer = PhaseTimer(clock)
    pipeline = Pipeline(AtLayer(1, SlowHiRED(0.5, clock=clock)), tiny.adapter)
    with torch.no_grad(), instrument(tiny.adapter, timer, pipeline):
        pipeline.generate({**inputs, "max_new_tokens": 1, "do_sample": False})
    timer.flush()
    assert len(pipeline.run.cuts[0].selections) == 2  # images of one layout are selected together
    assert (timer.spent["reducer"], timer.spent["prefill"]) == (1000, 0)


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
    assert spent == (expected | {"reducer": 1000} if reduced else expected)  # two images, selected together
    assert total == sum(spent.values())
    assert first == total - 21


@pytest.mark.parametrize(
    "variant", [Variant(PLAIN), Variant("HiRED", HiRED(0.3)), Variant("release-like", release_budget=0.3)]
)
def test_phases_of_a_second_call(tiny: BenchModel, inputs: Any, variant: Variant) -> None:
    """The second call generates two tokens. Decoding is measured by the first call, which has no phase borders."""
    calls: list[Any] = []
    hook = tiny.model.base_model.language_model.register_forward_hook(lambda *event: calls.append(event[0]))
    try:
        total, first_token, phases = time_phases(tiny, inputs, variant, 6, times_apart=True)
    finally:
        hook.remove()
    assert len(calls) == 6 + 2
    assert phases[DECODE] == total - first_token
    assert min(phases[name] for name in ("vision encode", "projector", "prefill")) > 0
    assert bool(phases.get("reducer")) == bool(phases.get("rewrite")) == (not variant.is_plain)


def test_the_call_finds_the_tables_of_its_layout(tiny: BenchModel, inputs: Any) -> None:
    operators = []
    for builds_tables in (False, True):
        counter = OperatorCounter()
        generate_once(tiny, inputs, Variant("HiRED", HiRED(0.3)), 1, context=counter, builds_tables=builds_tables)
        operators.append(counter.number)
    assert operators[1] < operators[0] - 50


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


def test_a_renamed_method_of_an_adapter_is_noticed(tiny: BenchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its phase would be empty."""
    monkeypatch.setitem(ADAPTER_PHASES, Resizable, {"encode_smaller": "packing"})
    before, pipeline = model_state(tiny.model), Pipeline(HiRED(0.3), tiny.adapter)
    timer = PhaseTimer(ManualClock())
    with pytest.raises(AttributeError, match="encode_smaller"), instrument(tiny.adapter, timer, pipeline):
        pass
    assert model_state(tiny.model) == before
