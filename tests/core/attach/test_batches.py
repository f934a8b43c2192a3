"""Rows, images and text of a batch do not depend on each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.helpers.llava import POSITIONS, ROWS, SQUARE, WIDE
from tests.helpers.oracle import generate, oracle_inputs_1d
from tokenprune import EncodedImage, Selection, TokenReducer
from tokenprune.adapter import find_adapter
from tokenprune.strategies import HiRED
from tokenprune.strategies.components import RandomSelection, UniformAllocation
from tokenprune.testing.tiny_models import batch, random_image, tiny_processor, tokenizer


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_batch_equals_its_single_rows(model: Any, family: str, positions: str) -> None:
    with HiRED(0.2, positions=positions)(model) as run:
        batched = generate(model, batch(family, *ROWS))
    image = 0
    for number, row in enumerate(ROWS):
        inputs = single_row_inputs(family, number)
        if not row:
            expected = generate(model, inputs)
        else:
            with HiRED(0.2, positions=positions)(model) as single:
                expected = generate(model, inputs)
            for selection in single.selections:
                assert torch.equal(selection.kept, run.selections[image].kept)
                image += 1
        assert torch.equal(expected[0, -6:], batched[number, -6:])
    assert image == len(run.selections) == 4


def single_row_inputs(family: str, number: int) -> Any:
    """Return the inputs of one row of `ROWS`, processed without the remaining rows."""
    processor, full = tiny_processor(family), batch(family, *ROWS)
    images = [random_image(*size, seed=10 * number + k) for k, size in enumerate(ROWS[number])]
    ids = full["input_ids"][number][full["attention_mask"][number].bool()]
    image = tokenizer().convert_tokens_to_ids("<image>")
    text = tokenizer().decode(torch.stack([t for k, t in enumerate(ids) if t != image or ids[k - 1] != image]))
    inputs = processor(images=images or None, text=[text], return_tensors="pt")
    assert torch.equal(inputs["input_ids"][0], ids)
    return inputs


def test_positional_and_text_only_calls(model: Any, inputs: Any, family: str) -> None:
    text = tokenizer()(["how many shapes"], return_tensors="pt")
    logits, sequences = model(text["input_ids"]).logits, generate(model, text)
    with HiRED(0.2)(model):
        assert torch.equal(model(text["input_ids"]).logits, logits)
        assert torch.equal(generate(model, text), sequences)
        short = model(
            inputs["input_ids"],
            inputs["pixel_values"],
            **{k: inputs[k] for k in inputs if k in ("image_sizes", "attention_mask")},
        )
    assert short.logits.shape[1] == inputs["input_ids"].shape[1]


def test_inputs_embeds_with_pixels(model: Any, inputs: Any) -> None:
    """Embeddings in place of ids give the same logits and the same new tokens."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    image_inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
    with HiRED(0.2)(model):
        by_ids = model(**inputs).logits
        assert torch.equal(model(inputs_embeds=embeds, **image_inputs).logits, by_ids)
        new_tokens = generate(model, {"inputs_embeds": embeds, **image_inputs})
        assert torch.equal(new_tokens, generate(model, inputs)[:, -6:])


def test_zero_budget_leaves_a_text_prompt(model: Any, family: str) -> None:
    inputs = batch(family, [SQUARE], [WIDE])
    image_token = model.config.image_token_id
    ids = inputs["input_ids"]
    text = torch.stack([row[(row != image_token) & (row != 0)] for row in ids if (row != image_token).any()][:1])
    with HiRED(0)(model) as run:
        out = generate(model, inputs, num_beams=2)
    assert run.account.kept == 0
    assert torch.equal(out[:1, -6:], generate(model, {"input_ids": text}, num_beams=2)[:, -6:])


def test_one_image_of_two_keeps_no_tokens(model: Any, family: str) -> None:
    """An image without kept tokens does not shift the features of the next image, also in beam search."""

    @dataclass
    class SecondOnly(TokenReducer):
        def select(self, image: EncodedImage) -> Selection:
            kept = image.geometry.valid & (image.geometry.tile_grid != ((2, 2) if family == "llava_next" else None))
            if family == "llava":
                kept = kept & bool(image.features.mean() > threshold)
            return Selection(image.geometry, kept, asked=int(kept.sum()))

    inputs = batch(family, [SQUARE, WIDE])
    encoding = find_adapter(model).encode(inputs, ())
    first, second = (float(image.features.mean()) for image in encoding.images)
    threshold = (first + second) / 2
    with SecondOnly(newlines="drop")(model) as run:
        out = generate(model, inputs, num_beams=3)
    kept = [selection.kept_tokens for selection in run.selections]
    assert 0 in kept
    assert max(kept) > 0
    oracle = oracle_inputs_1d(model, inputs, run, "reindex")
    oracle.pop("position_ids")
    assert torch.equal(out, generate(model, oracle, num_beams=3))


def test_tiles_of_all_images_in_one_tensor(model: Any, family: str) -> None:
    """LLaVA-NeXT also accepts the tiles of a batch without padding tiles, `[all tiles, 3, height, width]`."""
    inputs = batch(family, [SQUARE], [WIDE])
    with HiRED(0.2)(model) as padded:
        expected = model(**inputs).logits
    if family == "llava_next":
        tiles = [selection.geometry.tiles for selection in padded.selections]
        inputs["pixel_values"] = torch.cat([p[:n] for p, n in zip(inputs["pixel_values"], tiles, strict=True)])
    with HiRED(0.2)(model) as flat:
        assert torch.equal(model(**inputs).logits, expected)
    for padded_selection, flat_selection in zip(padded.selections, flat.selections, strict=True):
        assert padded_selection.pixels is not None
        assert flat_selection.pixels is not None
        assert torch.equal(padded_selection.pixels, flat_selection.pixels)


def test_random_selection_does_not_depend_on_the_batch(model: Any, family: str) -> None:
    reducer = HiRED(0.2, allocation=UniformAllocation(), selection=RandomSelection(seed=4))
    with reducer(model) as batch_run:
        model(**batch(family, [SQUARE], [WIDE]))
    with reducer(model) as single_run:
        model(**batch(family, [WIDE], seed=10))
    assert torch.equal(batch_run.selections[1].kept, single_run.selections[0].kept)
