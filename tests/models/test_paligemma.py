"""PaliGemma's prefix: images and question see each other, the suffix to be learned is causal."""

from __future__ import annotations

import torch

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import kept_mask, oracle_inputs, real_of_short
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import random_image


def test_a_suffix_stays_causal() -> None:
    """Token types are shortened with the prompt: without them, or with those of other places, the logits are others."""
    family = FAMILIES["paligemma"]
    model = family.model()
    given = family.processor()(
        images=[[random_image(56, 56)], [random_image(56, 56, seed=1)]],
        text=["<image>which shape", "<image>how many shapes are there"],
        suffix=["a red star", "two of them"],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    inputs = {name: value for name, value in given.items() if name != "labels"}
    assert set(inputs["token_type_ids"].unique().tolist()) == {0, 1}
    with torch.no_grad():
        with HiRED(0.2)(model, outputs="reduced") as run:
            short = model(**inputs, labels=given["labels"]).logits
        stays = kept_mask(model, inputs, run)
        oracle = oracle_inputs(model, inputs, run, "reindex")
        full = model(**oracle).logits
        causal = model(**{**oracle, "token_type_ids": torch.ones_like(oracle["token_type_ids"])}).logits
    real = real_of_short(model, inputs, run)
    assert float((short[real] - full[stays]).abs().max()) < 1e-5
    assert float((short[real] - causal[stays]).abs().max()) > 1e-3
