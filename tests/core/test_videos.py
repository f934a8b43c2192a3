"""Test prompts with images and videos, whose frames are not reduced."""

from __future__ import annotations

from types import SimpleNamespace
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


def build_model_and_inputs(name: str) -> tuple[Any, dict[str, Any]]:
    """Build a model and the inputs of a prompt with an image and a video of three frames."""
    family = FAMILIES[name]
    frames = np.random.default_rng(0).integers(0, 255, (3, 56, 56, 3), dtype=np.uint8)
    images: list[Any] = [random_image(112, 112)]
    text = ["USER: <image> and <video> which shape is left ASSISTANT:"]
    inputs = family.processor()(
        images=[images] if family.nested else images, videos=[frames], text=text, return_tensors="pt"
    )
    return family.model(), dict(inputs)


def generate_tokens(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    config = model.config
    suppress = [config.image_token_id, config.video_token_id]
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, suppress_tokens=suppress, **options)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_full_budget_changes_no_output(name: str) -> None:
    model, inputs = build_model_and_inputs(name)
    before = model(**inputs).logits
    with HiRED(1.0)(model):
        during = model(**inputs).logits
        greedy, beams = generate_tokens(model, inputs), generate_tokens(model, inputs, num_beams=2)
    assert torch.equal(during, before)
    assert torch.equal(greedy, generate_tokens(model, inputs))
    assert torch.equal(beams, generate_tokens(model, inputs, num_beams=2))


@pytest.mark.parametrize("positions", ["reindex", "preserve"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_equal_the_mask_oracle(name: str, positions: str) -> None:
    model, inputs = build_model_and_inputs(name)
    with HiRED(0.2, positions=positions)(model, outputs="reduced") as run:
        short = model(**inputs).logits
    full = model(**oracle_inputs(model, inputs, run, positions)).logits
    assert run.account.kept == 16
    assert float((short[0] - full[0][kept_mask(model, inputs, run)[0]]).abs().max()) < 1e-5


@torch.no_grad()
def test_frames_are_kept_if_images_are_encoded_again() -> None:
    """A reducer at the image stage passes on the frames, so other frames give other logits."""
    model, inputs = build_model_and_inputs("llava_next_video")
    reducer: TokenReducer = ImageDownsample(0.25)
    with reducer(model):
        logits = model(**inputs).logits
        logits_of_other_frames = model(**{**inputs, "pixel_values_videos": -inputs["pixel_values_videos"]}).logits
    assert logits.shape == logits_of_other_frames.shape
    assert float((logits - logits_of_other_frames).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_videos_next_to_images_with_mrope(name: str) -> None:
    """Videos are not reduced; at 100 % the output equals the output of the unmodified model."""
    family = FAMILIES[name]
    model, frames = family.model(), np.random.default_rng(0).integers(0, 255, (4, 56, 56, 3), dtype=np.uint8)
    template = "<|vision_start|>{}<|vision_end|>"
    text = f"USER: {template.format('<|image_pad|>')} and {template.format('<|video_pad|>')} what? ASSISTANT:"
    inputs = family.processor()(images=[random_image(112, 112)], videos=[frames], text=[text], return_tensors="pt")
    plain = model(**inputs).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**inputs).logits, plain)
    with HiRED(0.3, positions="preserve")(model, outputs="reduced") as run:
        short = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=1)
    oracle = model(**oracle_inputs(model, inputs, first_call_of_run(run), "preserve")).logits
    kept = kept_mask(model, inputs, first_call_of_run(run))
    assert float((short[0] - oracle[0][kept[0]]).abs().max()) < 1e-5


def first_call_of_run(run: Any) -> Any:
    """Return the selections of the first of two calls with one image each, as an object like a run."""
    return SimpleNamespace(selections=run.selections[:1])
