"""Calls that cannot be reduced raise an error or a warning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.llava import SQUARE, WIDE
from tests.helpers.oracle import generate
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import batch, tiny_model


def test_a_block_without_an_image_warns(model: Any) -> None:
    with pytest.warns(UserWarning, match="no image went through the model"), HiRED(0.2)(model):
        pass
    with pytest.raises(RuntimeError, match="no image went through the model"), HiRED(0.2)(model, strict=True):
        pass


def test_a_second_reducer_on_a_model_is_refused(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model) as run:
        model(**inputs)
        with pytest.raises(RuntimeError, match="already attached to this model"), HiRED(0.4)(model):
            pass
        before = run.account.image_count
        model(**inputs)
        assert run.account.image_count == 2 * before


def test_the_error_for_an_unknown_model_lists_the_supported_families() -> None:
    with pytest.raises(TypeError, match=r"Linear.*llava \(LlavaForCond.*llava_next.*docs/how-to/write-an-adapter\.md"):
        HiRED(0.2)(torch.nn.Linear(2, 2)).__enter__()


def test_a_part_of_a_model_and_a_model_as_an_option_are_refused(model: Any) -> None:
    name = type(model).__name__
    with pytest.raises(TypeError, match=f"is a part of {name}; pass the complete model"):
        HiRED(0.2)(model.model).__enter__()
    for arguments in ((model,), (0.2, model)):
        with pytest.raises(
            TypeError, match=rf"HiRED received a model \({name}\) .*`with HiRED\(...\)\(model\) as run:`"
        ):
            HiRED(*arguments)


def test_the_error_for_a_missing_signal_lists_required_and_provided_signals(family: str) -> None:
    model = tiny_model(family, tower="siglip")
    with pytest.raises(ValueError, match=r"needs cls_attention.*provides keys, pooling_att.*missing: cls_att"):
        HiRED(0.2, attention="cls")(model).__enter__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i | {"attention_mask": i["attention_mask"][:, None, None].bool()}, "2-D attention_mask"),
        (
            lambda i: (
                {k: v for k, v in i.items() if k != "attention_mask"}
                | {"position_ids": torch.arange(i["input_ids"].shape[1])[None] % 9}
            ),
            "packed sequences",
        ),
    ],
)
def test_4d_masks_and_packed_sequences_are_refused(model: Any, family: str, change: Any, message: str) -> None:
    inputs = dict(batch(family, [SQUARE]))
    with pytest.raises(ValueError, match=message), HiRED(0.2)(model):
        model(**change(inputs))


def test_conversations_from_a_reduced_cache_are_refused(model: Any, family: str) -> None:
    inputs = batch(family, [WIDE])
    with HiRED(0.2)(model):
        out = generate(model, inputs, return_dict_in_generate=True)
        next_turn = {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        with pytest.raises(ValueError, match="continues a conversation"):
            generate(model, next_turn, past_key_values=out.past_key_values)
        ids = torch.cat([out.sequences, inputs["input_ids"]], dim=1)  # with a second image, whose pixels are passed
        both = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with pytest.raises(ValueError, match="images cannot be added to a filled cache"):
            generate(model, both, past_key_values=out.past_key_values)


def test_features_without_a_grid_of_patches_are_refused(family: str) -> None:
    model = tiny_model(family)
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="no grid of patches"), HiRED(0.2)(model):
        model(**batch(family, [SQUARE]))
