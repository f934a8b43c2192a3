"""`tokenprune cost`: counts on the meta device against executed models, and the roofline against manual results."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from research import hired_table4 as table4
from tokenprune.account import kv_bytes, prefill_flops
from tokenprune.adapter import Adapter, find_adapter
from tokenprune.caches import find_cache, name_cache_argument
from tokenprune.cli.main import main
from tokenprune.configuration import as_config
from tokenprune.cuts import Cut
from tokenprune.decoder_reducer import AtLayer
from tokenprune.experiments.bench.architectures import build_meta_model, load_architecture
from tokenprune.experiments.bench.bench_model import parse_image_size
from tokenprune.experiments.bench.cost.count import (
    BatchCost,
    Tokens,
    count_batch,
    count_tokens,
    process_image,
    select_evenly,
)
from tokenprune.experiments.bench.cost.devices import DEVICES, GIB, Device, find_device
from tokenprune.experiments.bench.cost.meter import FUSED, Meter, Work
from tokenprune.experiments.bench.cost.report import CostConfig, as_json, format_bounds, format_flops
from tokenprune.experiments.bench.cost.roofline import Bounds, predict, predict_seconds
from tokenprune.models.internvl import InternVLAdapter
from tokenprune.models.llava import LlavaAdapter
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.models.llava_onevision import LlavaOnevisionAdapter
from tokenprune.models.qwen2_5_vl import Qwen25VLAdapter
from tokenprune.strategies import IPCV, EViT, RandomPatches, ToMe, UniformStride
from tokenprune.testing.examples import find_example

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

SIZE = (112, 112)
ADAPTERS: tuple[type[Adapter], ...] = (
    LlavaAdapter,
    LlavaNextAdapter,
    LlavaOnevisionAdapter,
    InternVLAdapter,
    Qwen25VLAdapter,
)


def build_example(adapter: type[Adapter]) -> tuple[Any, dict[str, Any], int]:
    """Return a tiny model on the CPU, inputs with one image, and the number of text tokens."""
    model = find_example(adapter).build_model()
    model.set_attn_implementation("eager")  # FlopCounterMode does not count the flash kernel of CPUs
    bound = find_adapter(model)
    inputs = find_example(adapter)(bound).build_inputs([[SIZE]])
    return model, inputs, int((~bound.placeholders(inputs)).sum())


def build_meta_example(adapter: type[Adapter]) -> Any:
    """Return the tiny model on the meta device."""
    model = find_example(adapter).build_model().to("meta")
    model.tie_weights()
    return model


def test_flops_and_bounds_are_readable() -> None:
    numbers = (43.382e12, 1.83e12, 14.9e9, 7e6, 12.0)
    assert [format_flops(number) for number in numbers] == ["43.4 T", "1.83 T", "14.9 G", "7.00 M", "12.0"]
    assert format_bounds(Bounds(6.17, 5.65), 1) == "5.65 to 6.17"


@pytest.mark.parametrize(("adapter", "budget"), [(LlavaNextAdapter, None), *((adapter, 0.3) for adapter in ADAPTERS)])
def test_counts_equal_the_executed_model(adapter: type[Adapter], budget: float | None) -> None:
    model, inputs, text = build_example(adapter)
    reducer = UniformStride(1.0 if budget is None else budget)
    with torch.inference_mode(), reducer(model) as run:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    with torch.inference_mode(), nullcontext() if budget is None else reducer(model):
        with FlopCounterMode(display=False) as measured:
            model(**inputs, use_cache=True, logits_to_keep=1)
        cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    counted = count_batch(build_meta_example(adapter), SIZE, budget, text_tokens=text)
    assert counted.encode.flops + counted.prefill.flops == measured.get_total_flops()
    assert counted.kv_bytes == cached == run.account.kv_bytes
    assert counted.tokens.prompt == run.account.prompt_lengths[0].reduced
    assert counted.prefill.flops == run.account.flops
    assert counted.weight_bytes == sum(value.nbytes for value in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("adapter", "tower", "budget"),
    [
        (LlavaNextAdapter, EViT(), None),
        (LlavaOnevisionAdapter, ToMe(0.5), 0.3),
        (InternVLAdapter, IPCV(), None),
        pytest.param(LlavaNextAdapter, ToMe(r=2), None, marks=pytest.mark.slow),
        pytest.param(LlavaOnevisionAdapter, IPCV(), 0.3, marks=pytest.mark.slow),
    ],
)
def test_counts_with_a_strategy_in_the_tower(adapter: type[Adapter], tower: Any, budget: float | None) -> None:
    """Counts from shapes equal the FLOPs that torch counts in an executed call, with a tolerance of 0.

    The numbers of kept newline tokens and of padding depend on the positions of the kept patches: newline tokens are
    dropped, and images without a budget have no padding.
    """
    model, inputs, text = build_example(adapter)
    meta = build_meta_example(adapter)
    entry = replace(tower, newlines="drop") if budget is None else tower >> UniformStride(budget, newlines="drop")
    with torch.inference_mode(), entry(model) as run, FlopCounterMode(display=False) as measured:
        model(**inputs, use_cache=True, logits_to_keep=1)
    counted = count_batch(meta, SIZE, budget, text_tokens=text, newlines="drop", tower=tower)
    assert counted.encode.flops + counted.prefill.flops == measured.get_total_flops()
    assert counted.tokens.prompt == run.account.prompt_lengths[0].reduced
    assert counted.tower_flops < count_batch(meta, SIZE, budget, text_tokens=text).tower_flops
    (batch,) = as_json(CostConfig(), [(counted, [])])["batches"]
    assert (batch["tower"], batch["tower_flops"]) == (as_config(tower), counted.tower_flops)


def test_towers_whose_flops_do_not_follow_from_shapes() -> None:
    with pytest.raises(ValueError, match="ToMe needs to merge patches"):
        count_batch(build_meta_example(Qwen25VLAdapter), SIZE, tower=ToMe(r=1))
    with pytest.raises(ValueError, match="depend on the positions of the kept patches"):
        count_batch(build_meta_example(Qwen25VLAdapter), SIZE, tower=RandomPatches(0.5))


@pytest.mark.parametrize("budget", [None, 0.6])
@torch.inference_mode()
def test_counts_with_a_cut_equal_the_executed_model(budget: float | None) -> None:
    model, inputs, text = build_example(LlavaNextAdapter)
    cut = AtLayer(1, UniformStride(0.5))
    reducer = cut if budget is None else UniformStride(budget) >> cut
    with reducer(model) as run:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        with FlopCounterMode(display=False) as measured:
            model(**inputs, use_cache=True, logits_to_keep=1)
    stored = [(layer.keys.shape[2], layer.keys.nbytes + layer.values.nbytes) for layer in out.past_key_values.layers]
    meta = build_meta_example(LlavaNextAdapter)
    counted = count_batch(meta, SIZE, budget, text_tokens=text, cuts=[Cut(1, 0.5)])
    assert counted.encode.flops + counted.prefill.flops == measured.get_total_flops()
    assert counted.prefill.flops == run.account.flops // run.account.row_count
    assert counted.kv_bytes == sum(size for _, size in stored)
    assert counted.token_kv_bytes == sum(size // length for length, size in stored)
    assert counted.kv_bytes < count_batch(meta, SIZE, budget, text_tokens=text).kv_bytes


def test_published_code_encodes_completely() -> None:
    model = build_meta_example(LlavaNextAdapter)
    full, reduced = count_batch(model, SIZE), count_batch(model, SIZE, 0.3)
    published = count_batch(model, SIZE, 0.3, encode_all=True)
    assert published.encode.flops == full.encode.flops > reduced.encode.flops
    assert published.tower_flops > reduced.tower_flops
    assert published.prefill.flops == reduced.prefill.flops < full.prefill.flops


def test_a_decode_step_equals_the_executed_step() -> None:
    model, inputs, text = build_example(LlavaNextAdapter)
    with torch.inference_mode():
        cache = find_cache(model(**inputs, use_cache=True))
        with FlopCounterMode(display=False) as measured:
            model(input_ids=torch.tensor([[5]]), **{name_cache_argument(model): cache})
    counted = count_batch(build_meta_example(LlavaNextAdapter), SIZE, text_tokens=text)
    assert counted.decode.flops == measured.get_total_flops()


def test_tower_and_projector_sum_to_the_encoding() -> None:
    model, inputs, text = build_example(LlavaNextAdapter)
    with torch.inference_mode(), FlopCounterMode(display=False) as measured:
        model.model.vision_tower(inputs["pixel_values"].flatten(0, 1))
    counted = count_batch(build_meta_example(LlavaNextAdapter), SIZE, text_tokens=text)
    assert counted.tower_flops == measured.get_total_flops() < counted.encode.flops


def test_full_size_agrees_with_the_account() -> None:
    """With grouped queries at full widths, eager and fused attention have equal FLOPs in different kernels."""
    config = load_architecture("llava-v1.6-mistral-7b", 2)
    eager_model, fused_model = (build_meta_model(config, attention=attention) for attention in ("eager", FUSED))
    eager = count_batch(eager_model, (336, 336), 0.2, batch=2)
    fused = count_batch(fused_model, (336, 336), 0.2, batch=2)
    shape = find_adapter(eager_model).llm
    assert eager.prefill.flops == 2 * prefill_flops(shape, eager.tokens.prompt)
    assert eager.kv_bytes == 2 * kv_bytes(shape, eager.tokens.prompt)
    for phase, work in eager.phases.items():
        assert work.flops == fused.phases[phase].flops == sum(flops * n for (flops, _), n in work.kernels.items())
    assert fused.prefill.peak_bytes <= eager.prefill.peak_bytes
    assert fused.encode.moved < eager.encode.moved


def test_tokens_of_a_large_image() -> None:
    adapter = find_adapter(build_meta_model(load_architecture("llava-v1.6-vicuna-7b", 1)))
    assert isinstance(adapter, LlavaNextAdapter)
    inputs, layout = process_image(adapter, (672, 672))
    full = count_tokens(layout, None, 60)
    assert inputs["pixel_values"].shape == (1, 5, 3, 336, 336)
    assert full == Tokens(encoded=2880, full=2928, kept=2880, newlines=48, text=60)
    assert full.prompt == 2988
    assert count_tokens(layout, select_evenly(layout, 160, "drop"), 60) == Tokens(2880, 2928, 160, 0, 60)
    assert count_tokens(layout, select_evenly(layout, 0.2, "keep"), 60).prompt == 576 + 48 + 60


def test_logits_of_all_positions_cost_more() -> None:
    model = build_meta_model(load_architecture("llava-1.5-7b", 1), attention=FUSED)
    last, full = (count_batch(model, (336, 336), all_logits=value) for value in (False, True))
    head, length = 2 * 4096 * 32064, last.tokens.prompt
    assert full.prefill.flops - last.prefill.flops == (length - 1) * head
    assert last.prefill.peak_bytes < length * 32064 * (2 + 4) < full.prefill.peak_bytes


def test_a_meter_counts_bytes() -> None:
    weight = torch.empty(3, 4, device="meta")
    meter = Meter()
    with torch.inference_mode():
        with meter.phase() as first:
            x = torch.empty(2, 3, device="meta")
            y = x @ weight
            y.view(8).view(4, 2)
            del x
        with meter.phase() as second:
            z = y + 1
    assert first.kernels == {(2 * 2 * 3 * 4, 4 * (6 + 12 + 8)): 1}
    assert (first.flops, first.read_once, first.peak_bytes) == (48, 4 * 12, 4 * (6 + 8))
    assert second.kernels == {(0, 4 * (8 + 8)): 1}
    assert (second.read_once, second.peak_bytes) == (4 * 8, 4 * (8 + 8))
    assert z.shape == (2, 4)


# --- the roofline -----------------------------------------------------------------------------------------------------

TOY = Device("toy", {"float32": 50.0, "float16": 100.0}, 2.0, 1000, "made up", {"bfloat16": "float32"})


def toy_batch() -> BatchCost:
    encode = Work(Counter({(100, 10): 2}), {}, 200, 5, 40)
    prefill = Work(Counter({(1000, 8): 1, (0, 6): 1}), {}, 1000, 30, 90)
    decode = Work(Counter({(10, 20): 1}), {}, 10, 20, 60)
    return BatchCost(2, None, Tokens(4, 4, 4, 0, 1), 800, 50, 10, encode, prefill, decode, 150)


def test_roofline() -> None:
    bounds = predict_seconds(toy_batch().encode, 50, 2)
    assert (bounds.fused, bounds.by_kernel) == (max(200 / 50, 5 / 2), 2 * max(100 / 50, 10 / 2))
    prediction = predict(toy_batch(), TOY, new_tokens=3, dtype="bfloat16")
    assert prediction.arithmetic == "float32"
    assert (prediction.ttft.fused, prediction.ttft.by_kernel) == (4 + 20, 10 + 20 + 3)
    assert (prediction.decode.fused, prediction.decode.by_kernel) == (10, 10)
    assert prediction.tokens_per_second.by_kernel == pytest.approx(2 * 3 / (33 + 2 * 10))
    assert prediction.peak_bytes == 800 + 90  # the prefill; decoding two more tokens of 10 bytes requires only 60 + 20
    assert predict(toy_batch(), TOY, 6).peak_bytes == 800 + 60 + 5 * 10
    half = predict(toy_batch(), TOY, 3, "float32", efficiency=0.5)
    assert half.ttft.by_kernel == 2 * prediction.ttft.by_kernel


def test_a_batch_that_exceeds_memory_does_not_fit() -> None:
    assert predict(toy_batch(), TOY, 3).fits
    assert not predict(toy_batch(), replace(TOY, memory=889), 3).fits


def test_a_device_uses_the_arithmetic_of_torch() -> None:
    p40 = find_device("P40")
    assert p40.peak_rate("float16") == (p40.flops["float32"], "float32")
    assert p40.peak_rate("float16", native=True)[0] == p40.flops["float32"] / 64
    with pytest.raises(ValueError, match="T4 has no bfloat16 arithmetic"):
        find_device("t4").peak_rate("bfloat16", native=True)
    for device in DEVICES.values():
        assert device.source
        assert all(device.peak_rate(dtype)[0] > 0 for dtype in ("float16", "bfloat16", "float32"))


@pytest.mark.parametrize(
    ("options", "message"), [({"efficiency": 0.0}, "share of the peak"), ({"new_tokens": 0}, "at least one")]
)
def test_invalid_numbers_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(toy_batch(), TOY, **{"new_tokens": 3, **options})


def test_sizes_are_height_x_width() -> None:
    assert parse_image_size("336x672", "--image-size") == (336, 672)
    for text in ("336", "0x5", "axb", "3x4x5"):
        with pytest.raises(ValueError, match=r"--image-size .*: give height x width in pixels"):
            parse_image_size(text, "--image-size")


# --- the table of the paper -------------------------------------------------------------------------------------------


def test_the_efficiency_is_fitted_to_the_published_table() -> None:
    rows = table4.predict_rows(table4.PUBLISHED[:2], llm_layers=1)
    share = table4.fit_efficiency(rows)
    assert rows[0].scaled_ttft(share) == pytest.approx(19.49)
    assert rows[0].native_ttft > rows[0].eager.ttft.by_kernel > rows[0].eager.ttft.fused
    assert rows[1].eager.peak_bytes < rows[0].eager.peak_bytes
    records, text = table4.as_records(rows), table4.as_markdown(rows)
    assert records[0]["peak_gib"]["published"] == 16.04
    assert "| 1 | 100% | 19.49 |" in text
    assert f"{rows[1].fused.peak_bytes / GIB:.2f}" in text


# --- the command ------------------------------------------------------------------------------------------------------

CUT = ("--model", "llava-1.5-7b", "--image-size", "336x336", "--llm-layers", "1")


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *CUT, "--budget", "50%", "10", "--device", "p40", "h100", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    full, half, ten = output["batches"]
    assert (output["llm_layers"], full["tokens"]["kept"], half["tokens"]["kept"]) == (1, 576, 288)
    assert ten["tokens"]["prompt"] == 10 + 60
    assert (half["budget"], ten["budget"]) == (0.5, 10)
    assert full["tower_flops"] + full["projector_flops"] == full["phases"]["encode"]["flops"]
    p40, h100 = half["devices"]
    assert p40["ttft_s"]["by_kernel"] > h100["ttft_s"]["by_kernel"] > h100["ttft_s"]["fused"] > 0
    assert half["phases"]["prefill"]["flops"] < full["phases"]["prefill"]["flops"]


@pytest.mark.slow
def test_the_command_counts_strategies_in_the_tower(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *CUT, "--budget", "100", "--tower", "ToMe(r=8)", "--device", "h100", "--json"]) == 0
    full, merged, reduced, both = json.loads(capsys.readouterr().out)["batches"]
    assert (full["tower"], merged["tower"]["init_args"]["r"]) == (None, 8)
    assert [entry["tokens"]["kept"] for entry in (full, merged, reduced, both)] == [576, 576 - 23 * 8, 100, 100]
    assert merged["tower_flops"] == both["tower_flops"] < reduced["tower_flops"]
    assert main(["cost", *CUT, "--tower", "ToMe(r=8)", "--device", "h100"]) == 0
    assert "ToMe r=8 per layer + 20%" in capsys.readouterr().out


def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *CUT, "--batch", "1000", "--device", "all"]) == 0
    out = capsys.readouterr().out
    assert "LLM cut to 1 layers" in out
    assert "out of memory" in out
    assert all(device.name.split()[0] in out for device in DEVICES.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "llava-7b"), "no architecture is called 'llava-7b'. Did you mean"),
        (("--device", "h20"), "no device is called 'h20'. Did you mean"),
        (("--image-size", "5"), "--image-size 5: give height x width in pixels"),
        (("--batch", "0"), "--batch 0: give at least 1"),
        (("--llm-layers", "1", "--budget", "1.5"), "neither a ratio nor a count"),
        (("--dtype", "int8"), "int8"),
        (("--tower", "HiRED(0.2)"), "acts at the stage projector, not inside the vision tower"),
    ],
)
def test_the_command_names_the_error(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", *options]) == 2
    assert message in capsys.readouterr().err
