"""Text that separates the rows or tiles of an image goes with them, if that is wanted."""

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

SEPARATED = [name for name, one in FAMILIES.items() if one.adapter.text_separator_side != "none"]


@pytest.fixture(scope="module", params=SEPARATED)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    return family.model()


@pytest.fixture(scope="module")
def inputs(family: Family) -> Any:
    return family.batch(*family.rows)


def stays(adapter: Any, inputs: Any, run: Run) -> tuple[Tensor, int]:
    """Which positions of the full prompt stay, bool `[rows, length]`, and how much text goes; token by token."""
    mask, gone = inputs["attention_mask"].bool().clone(), 0
    masks = iter([selection.packed_mask().tolist() for selection in run.selections])
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        image = [token == adapter.image_token_id for token in ids]
        position = 0
        while any(image[position:]):
            stretches: list[list[int]] = []  # positions of each stretch of one image
            for kept in next(masks):
                start, position = position, image.index(True, position)
                if not stretches or position != start:
                    stretches.append([])
                stretches[-1].append(position)
                mask[row, position] = kept
                position += 1
            for one, two in pairwise(stretches):
                owner = one if adapter.text_separator_side == "after" else two
                if not bool(mask[row, owner].any()):
                    mask[row, one[-1] + 1 : two[0]] = False
                    gone += two[0] - one[-1] - 1
    assert next(masks, None) is None
    return mask, gone


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
        mask, gone = stays(find_adapter(model), inputs, run)
        adapter = find_adapter(model)
        ids = adapter.counted_positions(mask) if positions == "reindex" else adapter.positions(inputs, generating=False)
        oracle = model(**full, attention_mask=mask.long(), position_ids=ids.expand(*ids.shape[:-2], *mask.shape)).logits
        width = int(mask.sum(1).max())
        assert short.shape[1] == width
        real = torch.arange(width) >= width - mask.sum(1, keepdim=True)
        if family.oracle is not None:
            assert float((short[real] - oracle[mask]).abs().max()) < family.oracle
        assert gone > 0
        assert lengths["keep"] - lengths["drop_empty"] == gone


@torch.no_grad()
def test_each_row_equals_itself_alone(family: Family, model: Any, inputs: Any) -> None:
    reducer = HiRED(0.2, positions="preserve", text_separators="drop_empty")
    with reducer(model, outputs="reduced"):
        together, written = model(**inputs).logits, generate(model, inputs)
    for number, row in enumerate(family.rows):
        if not row:
            continue
        one = family.batch(row, first=number)
        with reducer(model, outputs="reduced"):
            logits, answer = model(**one).logits, generate(model, one)
        assert float((logits[0] - together[number][-logits.shape[1] :]).abs().max()) < 1e-4
        assert torch.equal(answer[0, -4:], written[number, -4:])


@dataclass
class FirstOfEachRow(TokenReducer):
    """Keeps the first token of each row of tokens of each tile."""

    exact: ClassVar[bool] = False

    def select(self, image: EncodedImage) -> Selection:
        kept = torch.zeros_like(image.geometry.valid)
        kept[:, :: image.geometry.token_grid[1]] = True
        return Selection(image.geometry, kept & image.geometry.valid, int(kept.sum()))


@torch.no_grad()
def test_nothing_goes_where_every_row_or_tile_keeps_a_token(model: Any, inputs: Any) -> None:
    with FirstOfEachRow()(model) as run:
        expected = model(**inputs).logits
    with FirstOfEachRow(text_separators="drop_empty")(model):
        assert torch.equal(model(**inputs).logits, expected)
    assert any(full != entered for full, entered in run.account.prompt_lengths)


@torch.no_grad()
def test_an_image_without_text_inside_is_as_before() -> None:
    model, inputs = FAMILIES["llava_next"].model(), FAMILIES["llava_next"].batch([(60, 160)])
    assert find_adapter(model).text_separator_side == "none"
    with HiRED(0.2)(model) as run:
        kept = model(**inputs).logits
    with HiRED(0.2, text_separators="drop_empty")(model):
        assert torch.equal(model(**inputs).logits, kept)
    assert bool(real_positions(model, inputs, run).all())


def test_other_words_are_refused() -> None:
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
    ("name", "stays", "goes"),
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
def test_what_stays_of_the_prompt(name: str, stays: str, goes: str) -> None:
    family, seen = FAMILIES[name], []
    model, inputs = family.model(), family.batch([(112, 112)])
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0]), with_kwargs=True
    )
    for separators in ("keep", "drop_empty"):
        with OneStretch(text_separators=separators)(model):
            model(**inputs)
    hook.remove()
    before, after = (family.tokenizer.decode(ids) for ids in seen)
    assert goes in before
    assert stays in after
    assert goes not in after
    assert len(after) < len(before)
