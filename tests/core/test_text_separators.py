"""Test `text_separators="drop_empty"`, which drops the text between rows or tiles without kept tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import generate, real_positions
from tokenprune.adapter import find_adapter
from tokenprune.image import EncodedImage
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED
from tokenprune.testing.families.base import Family

SEPARATED = [name for name, family in FAMILIES.items() if family.adapter.text_separator_side != "none"]


@pytest.fixture(scope="module", params=SEPARATED)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    return family.model()


@pytest.fixture(scope="module")
def inputs(family: Family) -> Any:
    return family.batch(*family.rows)


def find_remaining_positions(adapter: Any, inputs: Any, run: Run) -> tuple[Tensor, int]:
    """Return a mask of the remaining positions, bool `[rows, length]`, and the number of dropped text tokens."""
    mask, dropped_count = inputs["attention_mask"].bool().clone(), 0
    masks = iter([selection.packed_mask().tolist() for selection in run.selections])
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        is_image_token = [token == adapter.image_token_id for token in ids]
        position = 0
        while any(is_image_token[position:]):
            stretches: list[list[int]] = []  # positions of each stretch of one image
            for kept in next(masks):
                start, position = position, is_image_token.index(True, position)
                if not stretches or position != start:
                    stretches.append([])
                stretches[-1].append(position)
                mask[row, position] = kept
                position += 1
            for previous, following in pairwise(stretches):
                owner = previous if adapter.text_separator_side == "after" else following
                if not bool(mask[row, owner].any()):
                    mask[row, previous[-1] + 1 : following[0]] = False
                    dropped_count += following[0] - previous[-1] - 1
    assert next(masks, None) is None
    return mask, dropped_count


@pytest.mark.parametrize("positions", ["reindex", "preserve"])
@torch.no_grad()
def test_logits_equal_the_oracle_that_masks_the_dropped_text(
    family: Family, model: Any, inputs: Any, positions: Any
) -> None:
    full = {name: value for name, value in inputs.items() if name != "attention_mask"}
    lengths = {}
    for separators in ("keep", "drop_empty"):
        with HiRED(0.2, positions=positions, text_separators=separators)(model, outputs="reduced") as run:
            short = model(**inputs).logits
        lengths[separators] = sum(entered for _, entered in run.account.prompt_lengths)
        if separators == "keep":
            continue
        mask, dropped_count = find_remaining_positions(find_adapter(model), inputs, run)
        adapter = find_adapter(model)
        is_counted = positions == "reindex"
        ids = (
            adapter.count_position_ids(mask) if is_counted else adapter.compute_position_ids(inputs, for_generate=False)
        )
        oracle = model(**full, attention_mask=mask.long(), position_ids=ids.expand(*ids.shape[:-2], *mask.shape)).logits
        width = int(mask.sum(1).max())
        assert short.shape[1] == width
        is_real = torch.arange(width) >= width - mask.sum(1, keepdim=True)
        if family.oracle is not None:
            assert float((short[is_real] - oracle[mask]).abs().max()) < family.oracle
        assert dropped_count > 0
        assert lengths["keep"] - lengths["drop_empty"] == dropped_count


@torch.no_grad()
def test_each_row_equals_itself_alone(family: Family, model: Any, inputs: Any) -> None:
    reducer = HiRED(0.2, positions="preserve", text_separators="drop_empty")
    with reducer(model, outputs="reduced"):
        batch_logits, batch_tokens = model(**inputs).logits, generate(model, inputs)
    for number, row in enumerate(family.rows):
        if not row:
            continue
        row_inputs = family.batch(row, first=number)
        with reducer(model, outputs="reduced"):
            logits, tokens = model(**row_inputs).logits, generate(model, row_inputs)
        assert float((logits[0] - batch_logits[number][-logits.shape[1] :]).abs().max()) < 1e-4
        assert torch.equal(tokens[0, -6:], batch_tokens[number, -6:])


@dataclass
class FirstOfEachRow(TokenReducer):
    """Keeps the first token of each token row of each tile."""

    exact: ClassVar[bool] = False

    def select(self, image: EncodedImage) -> Selection:
        kept = torch.zeros_like(image.geometry.valid)
        kept[:, :: image.geometry.token_grid[1]] = True
        return Selection(image.geometry, kept & image.geometry.valid, int(kept.sum()))


@torch.no_grad()
def test_no_text_is_dropped_if_every_row_or_tile_keeps_a_token(model: Any, inputs: Any) -> None:
    with FirstOfEachRow()(model) as run:
        expected = model(**inputs).logits
    with FirstOfEachRow(text_separators="drop_empty")(model):
        assert torch.equal(model(**inputs).logits, expected)
    assert any(full != entered for full, entered in run.account.prompt_lengths)


@torch.no_grad()
def test_families_without_text_separators_are_unchanged() -> None:
    model, inputs = FAMILIES["llava_next"].model(), FAMILIES["llava_next"].batch([(60, 160)])
    assert find_adapter(model).text_separator_side == "none"
    with HiRED(0.2)(model) as run:
        expected = model(**inputs).logits
    with HiRED(0.2, text_separators="drop_empty")(model):
        assert torch.equal(model(**inputs).logits, expected)
    assert bool(real_positions(model, inputs, run).all())


def test_unknown_options_of_text_separators_raise() -> None:
    with pytest.raises(ValueError, match=r"text_separators='drop' is not known; use one of 'keep', 'drop_empty'"):
        HiRED(text_separators="drop")  # type: ignore[arg-type]


@dataclass
class OneStretch(TokenReducer):
    """Keeps the tokens of the second row of an image of one tile, or of the second sub-image."""

    exact: ClassVar[bool] = False

    def select(self, image: EncodedImage) -> Selection:
        kept, cols = torch.zeros_like(image.geometry.valid), image.geometry.token_grid[1]
        if image.geometry.sub_images:
            kept[2] = True
        else:
            kept[0, cols : 2 * cols] = True
        return Selection(image.geometry, kept, int(kept.sum()))


@pytest.mark.parametrize(
    ("name", "remaining_text", "dropped_text"),
    [
        ("mistral3", "[IMG][IMG][IMG][IMG][IMG_BREAK][IMG_END]", "[IMG_BREAK][IMG_BREAK]"),
        ("pixtral", "[IMG][IMG][IMG][IMG][IMG_BREAK][IMG_END]", "[IMG_BREAK][IMG_BREAK]"),
        ("idefics3", "<row_1_col_2><image>", "<row_2_col_1>"),
        ("smolvlm", "<row_1_col_2><image>", "<row_2_col_1>"),
        ("aya_vision", "TILE_2<|IMG_PATCH|>", "TILE_3"),
        (
            "cohere2_vision",
            "<|IMG_PATCH|><|IMG_LINE_BREAK|><|IMG_LINE_BREAK|><|END",
            "<|START_OF_IMG|><|IMG_LINE_BREAK|>",
        ),
    ],
)
@torch.no_grad()
def test_remaining_and_dropped_text_of_the_prompt(name: str, remaining_text: str, dropped_text: str) -> None:
    family, prompt_ids = FAMILIES[name], []
    model, inputs = family.model(), family.batch([(112, 112)])
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: prompt_ids.append(kwargs["input_ids"][0]), with_kwargs=True
    )
    for separators in ("keep", "drop_empty"):
        with OneStretch(text_separators=separators)(model):
            model(**inputs)
    hook.remove()
    before, after = (family.tokenizer.decode(ids) for ids in prompt_ids)
    assert dropped_text in before
    assert remaining_text in after
    assert dropped_text not in after
    assert len(after) < len(before)
