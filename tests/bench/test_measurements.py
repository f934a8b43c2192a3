"""FLOPs, memory, and times of variants that are measured in alternation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from research import truncation_steps as steps
from tests.helpers.bench import SETTING, SIZES
from tokenprune.account import kv_bytes
from tokenprune.experiments.bench.bench_model import BenchModel
from tokenprune.experiments.bench.environment import peak_memory
from tokenprune.experiments.bench.flop_counter import FUSED_ATTENTION, SDPA_ON_CPU, create_flop_counter
from tokenprune.experiments.bench.measure import (
    PLAIN,
    BenchProtocol,
    Measurement,
    Variant,
    count_work,
    measure_variants,
    round_order,
)
from tokenprune.experiments.bench.phase_timer import DECODE, FIRST_TOKEN_PHASES, PHASES
from tokenprune.experiments.bench.results import as_data
from tokenprune.experiments.bench.samples import Ratio, Samples, interval_rank
from tokenprune.image import EncodedImage
from tokenprune.selection import Selection
from tokenprune.strategies import FasterVLM, HiRED
from tokenprune.testing.tiny_models import batch, tiny_model


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


def test_the_order_of_variants_is_balanced() -> None:
    rounds = [round_order("abc", number) for number in range(6)]
    assert Counter(order[0] for order in rounds) == {"a": 2, "b": 2, "c": 2}
    assert Counter(pair for order in rounds for pair in (tuple(order[:2]), tuple(order[1:]))).total() == 12
    for first, second in ("ab", "ac", "bc"):
        assert sum(order.index(first) < order.index(second) for order in rounds) == 3
    assert round_order("a", 5) == ["a"]


CALLS: list[str] = []


@dataclass
class LoggedFasterVLM(FasterVLM):
    """FasterVLM that appends its label to `CALLS`, or raises an out-of-memory error if the label is "greedy"."""

    label: str = "noted"

    def select(self, image: EncodedImage) -> Selection:
        if self.label == "greedy":
            raise torch.OutOfMemoryError("no room")
        CALLS.append(self.label)
        return super().select(image)


def test_variants_alternate_and_out_of_memory_is_recorded(tiny: BenchModel) -> None:
    CALLS.clear()
    labels = ("one", "two", "greedy")
    variants = [Variant(PLAIN), *(Variant(label, LoggedFasterVLM(0.3, label=label)) for label in labels)]
    outcomes = measure_variants(tiny, SETTING, variants, BenchProtocol(tokens=2, repeats=3, warmup=1))
    timed = CALLS[6:]  # both images are selected together; each variant: tables, counts, memory
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
