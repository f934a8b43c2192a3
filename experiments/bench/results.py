"""Converts the measurements of a workload to plain data, with ratios to the plain model and the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenprune.configuration import as_config
from tokenprune.experiments.bench.measure import BenchProtocol, Measurement, Workload
from tokenprune.experiments.bench.phase_timer import (
    DECODE,
    ENCODE_PHASES,
    FIRST_TOKEN_PHASES,
    REDUCER_PHASES,
    TOWER_PHASES,
)
from tokenprune.experiments.bench.samples import Ratio, Samples


def as_data(measurements: Sequence[Measurement], workload: Workload, protocol: BenchProtocol) -> dict[str, Any]:
    """Return the measurements of a workload as plain data, with ratios to the plain model and the baseline.

    Args:
        measurements: one per variant.
        workload: the inputs.
        protocol: length and number of the calls.
    """
    complete = {entry.variant.name: entry for entry in measurements if entry.error is None}
    plain = next((entry for entry in complete.values() if entry.variant.is_plain), None)
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
                "tower_patches_share": measurement.tower_patches_share,
                "kv_bytes": measurement.kv_bytes,
                "memory": measurement.memory,
                "flops": None
                if measurement.flops is None
                else {
                    "phases": measurement.flops,
                    "operators": measurement.operators,
                    "encode": measurement.sum_flops(ENCODE_PHASES),
                    "to_first_token": measurement.sum_flops(FIRST_TOKEN_PHASES),
                    "decode_per_step": measurement.sum_flops([DECODE]),
                },
                "launches": measurement.launches,
                "phases_ms": {
                    phase: to_milliseconds(seconds).as_data() for phase, seconds in measurement.phases.items()
                },
                "measures": {name: Samples(tuple(values)).as_data() for name, values in series.items()}
                | {"new_tokens_per_s": Samples(tuple(per_second)).as_data()},
            }
            if plain is not None and measurement is not plain:
                row["ratios"] = compare_with_plain(measurement, plain, workload, protocol)
            baseline = complete.get(measurement.variant.reference or "")
            if baseline is not None:
                row["release_ratios"] = {
                    "reference": baseline.variant.name,
                    **compare_times(measurement, baseline, workload, protocol),
                    **compare_memory(measurement, baseline),
                }
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
    ratios = compare_times(measurement, plain, workload, protocol)
    # This ratio is inverted: time of the reducer as a share of the plain model's time.
    reducer_seconds, vision_seconds = measurement.sum_seconds(REDUCER_PHASES), plain.sum_seconds(["vision encode"])
    ratios["own_share_of_vision_encode"] = Ratio.of(reducer_seconds, vision_seconds).as_data()
    flops = {
        name: (plain.sum_flops(phases), measurement.sum_flops(phases))
        for name, phases in (("flops_encode", ENCODE_PHASES), ("flops_to_first_token", FIRST_TOKEN_PHASES))
    }
    for name, (plain_flops, variant_flops) in flops.items():
        ratios[name] = None if plain_flops is None or variant_flops is None else plain_flops / max(1, variant_flops)
    ratios["kv_bytes"] = plain.kv_bytes / measurement.kv_bytes if measurement.kv_bytes else None
    ratios |= compare_tower(measurement, plain)
    flop_ratio = ratios["flops_to_first_token"]
    ratios["attained"] = None if flop_ratio is None else ratios["encode_prefill"]["median"] / flop_ratio
    return ratios | compare_memory(measurement, plain)


def compare_tower(measurement: Measurement, plain: Measurement) -> dict[str, Any]:
    """Return the shares variant / plain of the FLOPs of the vision tower and of the time to encode.

    Args:
        measurement: the measurement of a variant.
        plain: the measurement of the plain model.
    """
    flops, plain_flops = measurement.sum_flops(TOWER_PHASES), plain.sum_flops(TOWER_PHASES)
    share = None if flops is None or not plain_flops else flops / plain_flops
    seconds, plain_seconds = measurement.sum_seconds(ENCODE_PHASES), plain.sum_seconds(ENCODE_PHASES)
    return {"tower_flops_share": share, "encode_time_share": Ratio.of(seconds, plain_seconds).as_data()}


def compare_times(
    measurement: Measurement, reference: Measurement, workload: Workload, protocol: BenchProtocol
) -> dict[str, Any]:
    """Return the ratios reference / variant of times by quantity, with intervals.

    Args:
        measurement: the measurement of a variant.
        reference: the measurement of the plain model or of the baseline.
        workload: the inputs of both.
        protocol: length and number of the calls.
    """
    series = measurement.series(workload, protocol.tokens)
    reference_series = reference.series(workload, protocol.tokens)
    return {
        name.removesuffix("_ms"): Ratio.of(reference_series[name], values).as_data()
        for name, values in series.items()
        if min(values, default=0) > 0
    }


def compare_memory(measurement: Measurement, reference: Measurement) -> dict[str, float]:
    """Return the ratios reference / variant of the peak memory and of the live tensors, as far as both were measured.

    Args:
        measurement: the measurement of a variant.
        reference: the measurement of the plain model or of the baseline.
    """
    peak = "allocated" if "allocated" in measurement.memory else "resident"
    return {
        name: reference.memory[key] / measurement.memory[key]
        for name, key in (("memory", peak), ("tensors", "tensors"))
        if measurement.memory.get(key) and reference.memory.get(key)
    }
