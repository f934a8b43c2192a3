"""Counts of kernel launches, waits and dispatched operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenprune.experiments.bench.bench_model import BenchModel
from tokenprune.experiments.bench.launches import CUDA_EVENTS, OPERATORS, LaunchRecorder, OperatorCounter, count_events
from tokenprune.experiments.bench.measure import PLAIN, Measurement, Variant, count_work
from tokenprune.strategies import HiRED


def test_profiler_events_are_counted_by_kind() -> None:
    events = [
        ("cudaLaunchKernel", 7),
        ("cudaLaunchKernelExC", 2),
        ("cuLaunchKernelEx", 1),
        ("cudaMemcpyAsync", 9),
        ("Memcpy DtoH (Device -> Pageable)", 3),
        ("Memcpy DtoH (Device -> Pinned)", 1),
        ("Memcpy HtoD (Pageable -> Device)", 5),
        ("cudaStreamSynchronize", 8),
        ("cudaDeviceSynchronize", 2),
        ("aten::mm", 100),
    ]
    assert count_events(events) == {
        "kernel launches": 10,
        "graph launches": 0,
        "copies to the host": 4,
        "blocking waits": 8,
    }


def test_the_recorder_counts_at_the_end_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, nothing is launched."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with LaunchRecorder() as recorder:
        torch.ones(3).sum()
        assert recorder.counts == {}
    assert recorder.counts == dict.fromkeys(CUDA_EVENTS, 0)


def test_operators_are_counted_inside_the_block() -> None:
    tensor = torch.ones(3)
    with OperatorCounter() as counter:
        (tensor + 1).mul(2)
    tensor.sum()
    assert counter.number == 2


def test_operators_up_to_the_end_of_prefill(tiny: BenchModel, inputs: Any) -> None:
    """A reducer adds operators; two counts agree."""
    counts = []
    for variant in (Variant(PLAIN), Variant(PLAIN), Variant("HiRED", HiRED(0.3))):
        measurement = Measurement(variant)
        count_work(tiny, inputs, measurement)
        assert measurement.launches is not None
        assert list(measurement.launches) == [OPERATORS]
        counts.append(measurement.launches[OPERATORS])
    assert counts[0] == counts[1]
    assert counts[0] > 100
    assert counts[2] != counts[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_reads_and_launches_on_cuda() -> None:
    tensor = torch.ones(3, device="cuda")
    (tensor + 1).sum().item()
    with LaunchRecorder() as recorder:
        for _ in range(5):
            (tensor + 1).sum().item()
    assert recorder.counts["kernel launches"] >= 10
    assert recorder.counts["copies to the host"] == recorder.counts["blocking waits"] == 5
