"""Assistant models and custom loops of `generate` work with a reduced prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.helpers.generation import RecordingProcessor, generate
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch, tiny_model, tokenizer


@pytest.mark.parametrize("budget", [0.2, 1.0])
@torch.no_grad()
def test_assisted_decoding(model: Any, budget: float) -> None:
    """The attached model and another model assist, and logits processors receive the full prompt."""
    inputs = batch("llava_next", [(60, 160)])
    second_model = tiny_model("llava_next")
    with torch.no_grad():
        for parameter in second_model.lm_head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    with HiRED(budget)(model):
        greedy = generate(model, inputs, {"max_new_tokens": 6})
        for assistant in (model, second_model):
            processor = RecordingProcessor()
            arguments = {"assistant_model": assistant, "max_new_tokens": 6, "logits_processor": [processor]}
            assert torch.equal(generate(model, inputs, arguments), greedy)
            full = inputs["input_ids"]
            assert all(torch.equal(ids[:, : full.shape[1]], full) for ids in processor.ids)


@pytest.mark.parametrize("budget", [0.2, 1.0])
@pytest.mark.parametrize("has_own_tokenizer", [False, True])
@torch.no_grad()
def test_an_assistant_without_images(model: Any, budget: float, has_own_tokenizer: bool) -> None:
    """An assistant without images receives the placeholders as text tokens."""
    inputs = batch("llava_next", [(60, 160)])
    config = model.config.get_text_config().to_dict() | {"vocab_size": 450 if has_own_tokenizer else len(tokenizer())}
    torch.manual_seed(1)
    assistant = LlamaForCausalLM(LlamaConfig(**config)).eval()
    arguments: dict[str, Any] = {"assistant_model": assistant, "max_new_tokens": 6}
    if has_own_tokenizer:
        assistant_tokenizer = tokenizer(image_token="<image>", mark="<mark>")
        arguments |= {"tokenizer": tokenizer(), "assistant_tokenizer": assistant_tokenizer}
    with HiRED(budget)(model):
        assert torch.equal(generate(model, inputs, arguments), generate(model, inputs, {"max_new_tokens": 6}))


@pytest.mark.parametrize("budget", [0.2, 1.0])
@torch.no_grad()
def test_a_custom_loop_with_another_result(model: Any, inputs: Any, budget: float) -> None:
    """A result that contains no sequences is returned unchanged."""

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> dict[str, int]:
        return {"width": input_ids.shape[1]}

    with HiRED(budget)(model) as run:
        assert model.generate(**inputs, custom_generate=loop) == {"width": run.rows.index.shape[1]}


@pytest.mark.parametrize("budget", [0.2, 1.0])
@torch.no_grad()
def test_a_custom_loop_in_a_folder(model: Any, inputs: Any, tmp_path: Path, budget: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    file = tmp_path / "loop" / "custom_generate" / "generate.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import torch\n\n\ndef generate(model, input_ids, **kwargs):\n"
        "    return torch.cat([input_ids, torch.full((len(input_ids), 1), 7)], dim=1)\n"
    )
    with HiRED(budget)(model):
        output = model.generate(**inputs, custom_generate=str(tmp_path / "loop"), trust_remote_code=True)
    assert torch.equal(output, torch.cat([inputs["input_ids"], torch.full((2, 1), 7)], dim=1))


@torch.no_grad()
def test_a_custom_loop(model: Any, inputs: Any) -> None:
    """A callable receives the reduced prompt, and the returned sequences begin with the full prompt."""

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return torch.cat([input_ids, torch.full((len(input_ids), 1), 7)], dim=1)

    with HiRED(0.2)(model):
        output = model.generate(**inputs, custom_generate=loop)
    assert torch.equal(output, torch.cat([inputs["input_ids"], torch.full((2, 1), 7)], dim=1))
