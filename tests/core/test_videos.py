"""Videos beside images: their frames are handed over whole."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import kept_mask, oracle_inputs
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import HiRED, ImageDownsample
from tokenprune.testing.tiny_models import random_image

NAMES = ["llava_next_video", "llava_onevision"]


def mixed(name: str) -> tuple[Any, dict[str, Any]]:
    """A model, and a prompt with an image and a video of three frames."""
    family = FAMILIES[name]
    frames = np.random.default_rng(0).integers(0, 255, (3, 56, 56, 3), dtype=np.uint8)
    images: list[Any] = [random_image(112, 112)]
    text = ["USER: <image> and <video> which shape is left ASSISTANT:"]
    inputs = family.processor()(
        images=[images] if family.nested else images, videos=[frames], text=text, return_tensors="pt"
    )
    return family.model(), dict(inputs)


def written(model: Any, inputs: dict[str, Any], **how: Any) -> torch.Tensor:
    config = model.config
    suppress = [config.image_token_id, config.video_token_id]
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, suppress_tokens=suppress, **how)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_everything_kept_changes_nothing(name: str) -> None:
    model, inputs = mixed(name)
    before = model(**inputs).logits
    with HiRED(1.0)(model):
        during = model(**inputs).logits
        greedy, beams = written(model, inputs), written(model, inputs, num_beams=2)
    assert torch.equal(during, before)
    assert torch.equal(greedy, written(model, inputs))
    assert torch.equal(beams, written(model, inputs, num_beams=2))


@pytest.mark.parametrize("positions", ["reindex", "preserve"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_equal_the_mask_oracle(name: str, positions: str) -> None:
    model, inputs = mixed(name)
    with HiRED(0.2, positions=positions)(model, outputs="reduced") as run:
        short = model(**inputs).logits
    full = model(**oracle_inputs(model, inputs, run, positions)).logits
    assert run.account.kept == 16
    assert float((short[0] - full[0][kept_mask(model, inputs, run)[0]]).abs().max()) < 1e-5


@torch.no_grad()
def test_frames_stay_when_images_are_encoded_anew() -> None:
    """At the image stage, too: other frames give other logits."""
    model, inputs = mixed("llava_next_video")
    reducer: TokenReducer = ImageDownsample(0.25)
    with reducer(model):
        one = model(**inputs).logits
        other = model(**{**inputs, "pixel_values_videos": -inputs["pixel_values_videos"]}).logits
    assert one.shape == other.shape
    assert float((one - other).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_videos_beside_images_with_mrope(name: str) -> None:
    """Videos are passed on whole; at 100 % the output is that of the unmodified model."""
    family = FAMILIES[name]
    model, frames = family.model(), np.random.default_rng(0).integers(0, 255, (4, 56, 56, 3), dtype=np.uint8)
    part = "<|vision_start|>{}<|vision_end|>"
    text = f"USER: {part.format('<|image_pad|>')} and {part.format('<|video_pad|>')} what? ASSISTANT:"
    inputs = family.processor()(images=[random_image(112, 112)], videos=[frames], text=[text], return_tensors="pt")
    plain = model(**inputs).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**inputs).logits, plain)
    with HiRED(0.3, positions="preserve")(model, outputs="reduced") as run:
        short = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=1)
    oracle = model(**oracle_inputs(model, inputs, run_of_first(run), "preserve")).logits
    kept = kept_mask(model, inputs, run_of_first(run))
    assert float((short[0] - oracle[0][kept[0]]).abs().max()) < 1e-5


def run_of_first(run: Any) -> Any:
    """The record of the first of two calls with one image each."""
    first = copy.copy(run)
    first.selections = run.selections[:1]
    return first
