"""Attached strategies read CLS, received or pooling attention from towers and kernels of each kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.helpers.llava import ROWS, SQUARE, WIDE
from tests.helpers.oracle import kept_mask, oracle_inputs_1d, real_positions
from tokenprune import EncodedImage, ScoreReducer, Signal
from tokenprune.adapter import find_adapter
from tokenprune.strategies import FasterVLM, HiRED
from tokenprune.testing.tiny_models import batch, tiny_model


def test_received_attention_replaces_cls_attention_without_a_cls_token(family: str) -> None:
    """HiRED keeps the tokens that received attention selects in place of CLS attention, and reports its signal."""
    model, inputs = tiny_model(family, tower="siglip"), batch(family, *ROWS, tower="siglip")
    with HiRED(0.2)(model) as run:
        model(**inputs)
    assert run.attention == "received_attention"
    signals = [Signal("received_attention", "first"), Signal("received_attention", "feature")]
    for image, selection in zip(find_adapter(model).encode(inputs, signals).images, run.selections, strict=True):
        cls_signals = {("cls_attention", layer): value for (_, layer), value in image.signals.items()}
        assert torch.equal(HiRED(0.2).reduce(replace(image, signals=cls_signals)).kept, selection.kept)
    clip = tiny_model(family)
    with HiRED(0.2, attention="received")(clip) as received:
        clip(**batch(family, *ROWS))
    assert received.attention == "received_attention"
    with HiRED(0.2)(clip) as cls:
        clip(**batch(family, *ROWS))
    assert cls.attention == "cls_attention"
    assert any(not torch.equal(a.kept, b.kept) for a, b in zip(cls.selections, received.selections, strict=True))


def test_selection_by_pooling_attention(family: str) -> None:
    model, inputs = tiny_model(family, tower="siglip"), batch(family, *ROWS, tower="siglip")
    with torch.no_grad():
        model.model.vision_tower.head.attention.in_proj_weight.mul_(8)
    with FasterVLM(0.2, attention="pooling")(model) as run:
        model(**inputs)
    assert run.attention == "pooling_attention"
    signals = [Signal("pooling_attention", "feature")]
    for image, selection in zip(find_adapter(model).encode(inputs, signals).images, run.selections, strict=True):
        scores = image.pooling_attention().mean(dim=1).masked_fill(~image.geometry.valid, -1)
        for tile, kept in enumerate(selection.kept):
            number = int(kept.sum())
            assert torch.equal(scores[tile].topk(number).indices.sort().values, kept.nonzero()[:, 0])
    with pytest.raises(ValueError, match="missing: pooling_attention"):
        FasterVLM(0.2, attention="pooling")(tiny_model(family)).__enter__()


def test_towers_without_cls_provide_received_attention(family: str) -> None:
    @dataclass
    class ReceivedAttention(ScoreReducer):
        @property
        def needs(self) -> tuple[Signal, ...]:
            return (Signal("received_attention", "feature"),)

        def score(self, image: EncodedImage) -> torch.Tensor:
            return image.received_attention("feature").mean(dim=1)

    model = tiny_model(family, tower="siglip")
    inputs = batch(family, [SQUARE], [WIDE], tower="siglip")
    with ReceivedAttention(0.2)(model, outputs="reduced") as run:
        short = model(**inputs).logits
    full = model(**oracle_inputs_1d(model, inputs, run, "reindex")).logits
    difference = short[real_positions(model, inputs, run, "left")] - full[kept_mask(model, inputs, run)]
    assert difference.abs().max() < 1e-5


def test_a_custom_attention_kernel_runs_and_reads_its_config(family: str) -> None:
    """A kernel can read its name from the config of the module, as flash attention does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    kernel_names = []

    def kernel(module: Any, *args: Any, **kwargs: Any) -> Any:
        kernel_names.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("kernel_of_a_test", kernel)
    AttentionMaskInterface.register("kernel_of_a_test", sdpa_mask)
    model, inputs = tiny_model(family, "kernel_of_a_test"), batch(family, [SQUARE])
    with HiRED(0.2)(model, outputs="reduced") as run:
        short = model(**inputs).logits
    assert set(kernel_names) == {"kernel_of_a_test"}
    assert len(kernel_names) == 3 + 2  # every required layer of the tower and every layer of the LLM, once
    sdpa = tiny_model(family)
    with HiRED(0.2)(sdpa, outputs="reduced") as sdpa_run:
        assert torch.equal(sdpa(**inputs).logits, short)
    assert torch.equal(sdpa_run.selections[0].kept, run.selections[0].kept)
