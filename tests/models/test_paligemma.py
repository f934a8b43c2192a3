"""PaliGemma: attention is bidirectional between images and question, and causal in the suffix of training samples."""

from __future__ import annotations

import torch

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import kept_mask, oracle_inputs, real_positions
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import random_image


def test_a_suffix_stays_causal() -> None:
    """Token types are shortened with the prompt; other token types change the logits."""
    family = FAMILIES["paligemma"]
    model = family.model()
    batch = family.processor()(
        images=[[random_image(56, 56)], [random_image(56, 56, seed=1)]],
        text=["<image>which shape", "<image>how many shapes are there"],
        suffix=["a red star", "two of them"],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert set(inputs["token_type_ids"].unique().tolist()) == {0, 1}
    with torch.no_grad():
        with HiRED(0.2)(model, outputs="reduced") as run:
            reduced = model(**inputs, labels=batch["labels"]).logits
        kept = kept_mask(model, inputs, run)
        oracle = oracle_inputs(model, inputs, run, "reindex")
        full = model(**oracle).logits
        causal = model(**{**oracle, "token_type_ids": torch.ones_like(oracle["token_type_ids"])}).logits
    real = real_positions(model, inputs, run)
    assert float((reduced[real] - full[kept]).abs().max()) < 1e-5
    assert float((reduced[real] - causal[kept]).abs().max()) > 1e-3
