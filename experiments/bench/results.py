"""Converts the measurements of a workload to plain data, with ratios to the plain model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenprune.configuration import as_config
from tokenprune.experiments.bench.measure import BenchProtocol, Measurement, Workload
from tokenprune.experiments.bench.phase_timer import DECODE, ENCODE_PHASES, FIRST_TOKEN_PHASES, REDUCER_PHASES
from tokenprune.experiments.bench.samples import Ratio, Samples


def as_data(measurements: Sequence[Measurement], workload: Workload, protocol: BenchProtocol) -> dict[str, Any]:
    """Return the measurements of a workload as plain data, with ratios to the plain model.

    Args:
        measurements: one per variant.
        workload: the inputs.
        protocol: length and number of the calls.
    """
    plain = next((m for m in measurements if m.variant.reducer is None and m.error is None), None)
    rows = []
    for measurement in measurements:
        reducer = measurement.variant.reducer
        row: dict[str, Any] = {
            "name": measurement.variant.name,
            "reducer": None if reducer is None else as_config(reducer),
            "error": measurement.error,
        }
        if measurement.error is None:
            series = measurement.series(workload, protocol.tokens)
            per_second = [1e3 / value for value in series["ms_per_new_token"]]
            row |= {
                "prompt_length": measurement.prompt,
                "visual_tokens": measurement.visual,
                "kv_bytes": measurement.kv_bytes,
                "memory": measurement.memory,
                "flops": {
                    "phases": measurement.flops,
                    "operators": measurement.operators,
                    "encode": measurement.sum_flops(ENCODE_PHASES),
                    "to_first_token": measurement.sum_flops(FIRST_TOKEN_PHASES),
                    "decode_per_step": measurement.sum_flops([DECODE]),
                },
                "phases_ms": {
                    phase: to_milliseconds(seconds).as_data() for phase, seconds in measurement.phases.items()
                },
                "measures": {name: Samples(tuple(values)).as_data() for name, values in series.items()}
                | {"new_tokens_per_s": Samples(tuple(per_second)).as_data()},
            }
            if plain is not None and measurement is not plain:
                row["ratios"] = compare_with_plain(measurement, plain, workload, protocol)
        rows.append(row)
    return {"batch": workload.batch, "height": workload.size[0], "width": workload.size[1], "variants": rows}


def to_milliseconds(seconds: Sequence[float]) -> Samples:
    """Return times in seconds as samples in milliseconds."""
    return Samples(tuple(1e3 * value for value in seconds))


def compare_with_plain(
    measurement: Measurement, plain: Measurement, workload: Workload, protocol: BenchProtocol
) -> dict[str, Any]:
    """Return the ratios plain / variant by quantity: times with intervals, FLOPs and bytes as exact numbers.

    Args:
        measurement: the measurement of a variant.
        plain: the measurement of the plain model.
        workload: the inputs of both.
        protocol: length and number of the calls.
    """
    variant_series = measurement.series(workload, protocol.tokens)
    plain_series = plain.series(workload, protocol.tokens)
    ratios: dict[str, Any] = {
        name.removesuffix("_ms"): Ratio.of(plain_series[name], variant_series[name]).as_data()
        for name in variant_series
        if min(variant_series[name], default=0) > 0
    }
    # This ratio is inverted: time of the reducer as a share of the plain model's time.
    reducer_seconds, vision_seconds = measurement.sum_seconds(REDUCER_PHASES), plain.sum_seconds(["vision encode"])
    ratios["own_share_of_vision_encode"] = Ratio.of(reducer_seconds, vision_seconds).as_data()
    ratios["flops_encode"] = plain.sum_flops(ENCODE_PHASES) / max(1, measurement.sum_flops(ENCODE_PHASES))
    ratios["flops_to_first_token"] = plain.sum_flops(FIRST_TOKEN_PHASES) / measurement.sum_flops(FIRST_TOKEN_PHASES)
    ratios["kv_bytes"] = plain.kv_bytes / measurement.kv_bytes if measurement.kv_bytes else None
    ratios["attained"] = ratios["encode_prefill"]["median"] / ratios["flops_to_first_token"]
    peak = "allocated" if "allocated" in measurement.memory else "resident"
    if measurement.memory.get(peak) and plain.memory.get(peak):
        ratios["memory"] = plain.memory[peak] / measurement.memory[peak]
    ratios["tensors"] = plain.memory["tensors"] / measurement.memory["tensors"]
    return ratios
