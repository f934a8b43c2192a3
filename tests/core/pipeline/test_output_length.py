"""Outputs have the length of the full prompt, also for the Trainer and as tuples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.helpers.llava import TWO_ROWS
from tests.helpers.oracle import kept_mask
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch, tiny_model


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_outputs_have_the_length_of_the_prompt(model: Any, side: str) -> None:
    """A dropped position holds the output of the last kept position before it."""
    inputs = batch("llava_next", *TWO_ROWS, [], side=side)
    with HiRED(0.2)(model, outputs="reduced") as run:
        short = model(**inputs, output_hidden_states=True)
    with HiRED(0.2)(model):
        full = model(**inputs, output_hidden_states=True)
    kept, real = kept_mask(model, inputs, run), inputs["attention_mask"].bool()
    assert full.logits.shape[:2] == inputs["input_ids"].shape
    assert len(full.hidden_states) == len(short.hidden_states)
    pairs = [(full.logits, short.logits), *zip(full.hidden_states, short.hidden_states, strict=True)]
    for long, reduced in pairs:
        for row in range(len(long)):
            states = iter(reduced[row][run.rows.mask[row]])
            last = None
            for position in range(long.shape[1]):
                last = next(states) if kept[row, position] else last
                if real[row, position] and last is not None:
                    assert torch.equal(long[row, position], last)


@pytest.mark.parametrize("keep", [1, 3, 60, torch.tensor([0, 4, -1])])
@torch.no_grad()
def test_logits_to_keep(model: Any, inputs: Any, keep: Any) -> None:
    with HiRED(0.2)(model):
        all_logits = model(**inputs).logits
        kept_logits = model(**inputs, logits_to_keep=keep).logits
    expected = all_logits[:, keep] if isinstance(keep, Tensor) else all_logits[:, -keep:]
    torch.testing.assert_close(kept_logits, expected)


@torch.no_grad()
def test_tuples_are_expanded_too(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model):
        output, output_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(output_tuple, tuple)
    assert torch.equal(output_tuple[0], output.logits)


@torch.no_grad()
def test_the_last_token_of_right_padded_rows(model: Any) -> None:
    """The state of the last real token, which embedding models pool, equals its state in a batch of one row."""
    inputs = batch("llava_next", *TWO_ROWS, side="right")
    last = inputs["attention_mask"].sum(1) - 1
    with HiRED(0.2)(model):
        batch_states = model(**inputs, output_hidden_states=True).hidden_states[-1][torch.arange(2), last]
        for row in range(2):
            row_inputs = {
                name: inputs[name][row : row + 1, : last[row] + 1] for name in ("input_ids", "attention_mask")
            }
            images = slice(0, 1) if row == 0 else slice(1, 3)
            row_inputs |= {name: inputs[name][images] for name in ("pixel_values", "image_sizes")}
            state = model(**row_inputs, output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(batch_states[row], state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_with_label_smoothing_and_metrics(tmp_path: Any, smoothing: float) -> None:
    model, inputs = tiny_model("llava_next"), batch("llava_next", [(112, 112)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    row = {**{name: value[0] for name, value in inputs.items()}, "labels": labels[0]}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        label_smoothing_factor=smoothing,
    )
    shapes = []

    def record_shapes(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        shapes.append((logits.shape[:2], prediction.label_ids.shape))
        return {}

    trainer = Trainer(model, arguments, train_dataset=[row], eval_dataset=[row], compute_metrics=record_shapes)
    with HiRED(0.2)(model):
        assert trainer.train().training_loss > 0
        assert trainer.evaluate()["eval_loss"] > 0
    assert shapes
    assert all(logits_shape == labels_shape for logits_shape, labels_shape in shapes)


def test_a_loss_from_logits_equals_the_loss_of_the_model(model: Any, inputs: Any) -> None:
    unlabeled = (inputs["input_ids"] == model.config.image_token_id) | (inputs["attention_mask"] == 0)
    labels = inputs["input_ids"].masked_fill(unlabeled, -100)
    labels[inputs["attention_mask"].cumsum(1) == 1] = -100  # its prediction would come from padding
    with HiRED(0.2)(model), torch.no_grad():
        model_loss = model(**inputs, labels=labels).loss
        logits = model(**inputs).logits
    external_loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(external_loss, model_loss)


@torch.no_grad()
def test_more_logits_than_positions_and_tuples_by_config(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model):
        logits = model(**inputs).logits
        assert torch.equal(model(**inputs, logits_to_keep=10_000).logits, logits)
        model.config.return_dict = False
        assert torch.equal(model(**inputs)[0], logits)
