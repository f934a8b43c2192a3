"""Blocks and handles attach and detach a strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.families import FAMILIES
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch, tiny_model


@torch.no_grad()
def test_attach_and_detach_through_a_handle(model: Any, inputs: Any) -> None:
    plain = model(**inputs).logits
    handle = HiRED(0.2).attach(model)
    assert not torch.equal(model(**inputs).logits, plain)
    assert handle.run.account.image_count == 3
    handle.detach()
    handle.detach()
    assert torch.equal(model(**inputs).logits, plain)


def test_a_block_of_text_only_warns(model: Any, inputs: Any) -> None:
    text = {name: inputs[name][:, -5:] for name in ("input_ids", "attention_mask")}
    with pytest.warns(UserWarning, match="no image went through"), HiRED(0.2)(model):
        model(**text)
    with pytest.raises(RuntimeError, match="no image went through"), HiRED(0.2)(model, strict=True):
        model(**text)


def test_using_an_attachment_without_with_raises(model: Any) -> None:
    attachment = HiRED(0.2)(model)
    with pytest.raises(AttributeError, match="write `with HiRED"):
        attachment.generate()
    with pytest.raises(RuntimeError, match="write `with HiRED"):
        _ = attachment.run
    with pytest.warns(UserWarning, match="does not attach the strategy by itself"):
        attachment.__del__()
    attachment.attach()
    attachment.detach()


def test_an_attachment_can_be_entered_again(model: Any, inputs: Any) -> None:
    attachment = HiRED(0.2)(model)
    for _ in range(2):
        with attachment as run:
            model(**inputs)
            with pytest.raises(RuntimeError, match="attached already"):
                attachment.__enter__()
        assert run.account.image_count == 3


def test_a_call_with_videos_only_is_refused() -> None:
    family = FAMILIES["llava_next_video"]
    model = family.model()
    frames = {"pixel_values_videos": torch.zeros(1, 2, 3, 56, 56), "input_ids": torch.tensor([[1, 5, 6]])}
    handle = HiRED(0.2).attach(model)
    with torch.no_grad():
        for call in (model, model.generate):
            with pytest.raises(NotImplementedError, match="videos are not reduced"):
                call(**frames)
    handle.detach()


@torch.no_grad()
def test_an_assistant_model_with_an_attached_reducer(model: Any) -> None:
    inputs, assistant = batch("llava_next", [(60, 160)]), tiny_model("llava_next")
    handle = HiRED(0.2).attach(assistant)
    with HiRED(0.2)(model):
        greedy = model.generate(**inputs, max_new_tokens=5)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, assistant_model=assistant), greedy)
    handle.detach()
