"""Llama 3.2 Vision: its visual tokens are not in the prompt, so the mask oracle masks columns of cross-attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.oracle import (
    OutlierReducer,
    build_answer,
    collect_state,
    draw_spot,
    keeps_spot,
    remove_positions,
    transpose_tokens,
)
from tokenprune.models.mllama import MllamaAdapter
from tokenprune.run import Run
from tokenprune.strategies import HiRED
from tokenprune.testing.examples import build_example
from tokenprune.testing.families.base import TILE
from tokenprune.testing.families.mllama import FAMILY, processor
from tokenprune.testing.tiny_models import random_image

ROWS = ([(112, 112)], [(60, 112), (112, 50)], [(40, 50)])


@pytest.fixture(scope="module")
def model() -> Any:
    model = FAMILY.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:  # initialized with zero, which hides the images from the LLM
                parameter.fill_(1.0)
        model(**FAMILY.batch(ROWS[0]))
    return model


@pytest.fixture(scope="module")
def inputs() -> Any:
    return FAMILY.batch(*ROWS)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def generate(model: Any, inputs: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **options)


def kept_columns(model: Any, run: Run, inputs: Any) -> Tensor:
    """Return the mask of the kept keys among all keys of each row, computed tile by tile, bool `[rows, keys]`."""
    tower = model.model.vision_model
    ids = inputs["aspect_ratio_ids"]
    keys, side, tiles = tower.num_patches, TILE // 14, tower.config.max_num_tiles
    columns = torch.zeros(*ids.shape, tiles, keys, dtype=torch.bool)
    for (row, number), selection in zip(ids.nonzero().tolist(), run.selections, strict=True):
        rows, cols = tower.config.supported_aspect_ratios[int(ids[row, number]) - 1]
        canvas = selection.kept.view(rows * side, cols * side)
        for tile in range(rows * cols):
            top, left = tile // cols * side, tile % cols * side
            kept = canvas[top : top + side, left : left + side].flatten()
            columns[row, number, tile] = torch.cat([kept.any()[None], kept])  # CLS stays with its tile
    return columns.flatten(1)


@contextmanager
def attend_only(model: Any, columns: Tensor) -> Iterator[None]:
    """Restrict the cross-attention of the unmodified model to some keys."""

    def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        full_mask = kwargs["cross_attention_mask"]
        dropped = ~columns.repeat_interleave(len(full_mask) // len(columns), 0)[:, None, None]
        return args, {
            **kwargs,
            "cross_attention_mask": full_mask.masked_fill(dropped, torch.finfo(full_mask.dtype).min),
        }

    hook = model.model.language_model.register_forward_pre_hook(mask, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def test_full_budget_changes_nothing(model: Any, inputs: Any) -> None:
    before = model(**inputs).logits
    options = ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"})
    assert float(before.std()) > 0.1
    answers = [generate(model, inputs, **option) for option in options]
    with HiRED(1.0)(model):
        assert torch.equal(model(**inputs).logits, before)
        for option, answer in zip(options, answers, strict=True):
            assert torch.equal(generate(model, inputs, **option), answer)
    assert torch.equal(model(**inputs).logits, before)


def test_logits_and_answers_equal_the_mask_oracle(model: Any, inputs: Any) -> None:
    before = model(**inputs).logits
    with HiRED(0.2)(model) as run:
        reduced = model(**inputs).logits
    assert [s.kept_tokens for s in run.selections] == [s.asked for s in run.selections]
    real = inputs["attention_mask"].bool()
    options = ({}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}, {"do_sample": True})
    with attend_only(model, kept_columns(model, run, inputs)):
        oracle = model(**inputs).logits
        answers = [generate(model, inputs, **option) for option in options]
    assert float((reduced - oracle)[real].abs().max()) < 1e-5
    assert float((reduced - before)[real].abs().max()) > 1e-3
    with HiRED(0.2)(model):
        for option, answer in zip(options, answers, strict=True):
            assert torch.equal(generate(model, inputs, **option), answer)


def test_rows_of_a_batch_equal_separate_calls(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model) as run:
        batch_logits, count = model(**inputs).logits, 0
    for number, row in enumerate(ROWS):
        with HiRED(0.2)(model) as row_run:
            logits = model(**FAMILY.batch(row, first=number)).logits[0]
        for selection in row_run.selections:
            assert torch.equal(selection.kept, run.selections[count].kept)
            count += 1
        assert float((logits - batch_logits[number][inputs["attention_mask"][number].bool()]).abs().max()) < 1e-4


def test_a_text_only_row_equals_a_separate_call() -> None:
    """With a strategy, a text-only row attends to no image key; in the unmodified model, it attends to padding."""
    example = build_example(MllamaAdapter)
    model, inputs = example.adapter.model, example.build_inputs([[(112, 112)], []])
    with HiRED(0.2)(model):
        batch_logits = model(**inputs).logits[1]
    real = inputs["attention_mask"][1].bool()
    row_logits = model(input_ids=inputs["input_ids"][1][real][None]).logits[0]
    assert float((batch_logits[real] - row_logits).abs().max()) < 1e-5


def test_loss_equals_the_loss_with_masked_keys(model: Any, inputs: Any) -> None:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    before = model(**inputs, labels=labels).loss
    with HiRED(1.0)(model):
        assert torch.equal(model(**inputs, labels=labels).loss, before)
    with HiRED(0.2)(model) as run:
        reduced = model(**inputs, labels=labels).loss
    with attend_only(model, kept_columns(model, run, inputs)):
        assert float((model(**inputs, labels=labels).loss - reduced).abs()) < 1e-4


def test_bfloat16() -> None:
    example = build_example(MllamaAdapter)
    model = example.adapter.model.to(torch.bfloat16)
    inputs = example.build_inputs([[(112, 112)], [(60, 112), (40, 40)]])
    cast = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    before = model(**cast).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**cast).logits, before)
    with HiRED(0.2)(model):
        assert bool(model(**cast).logits.isfinite().all())


def test_pipeline(model: Any) -> None:
    answer = build_answer(model, processor(), random_image(60, 112), FAMILY.text(1))
    before = answer()
    with HiRED(1.0)(model):
        assert answer() == before
    with HiRED(2)(model) as run:
        assert isinstance(answer(), str)
    assert run.account.kept == 2


def test_a_zero_budget_runs_and_the_model_is_restored(model: Any, inputs: Any) -> None:
    generate(model, inputs)
    before = collect_state(model)
    with HiRED(0)(model) as run:
        assert bool(model(**inputs).logits.isfinite().all())
    assert run.account.kept == 0
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), HiRED(0.2)(model):
        model(**inputs)
    hook.remove()
    assert collect_state(model) == before
    assert "forward" not in vars(model.model.vision_model)


@pytest.mark.parametrize("spot", [(0.2, 0.85), (0.85, 0.2), (0.7, 0.6)])
@pytest.mark.parametrize("size", [(112, 112), (56, 112), (112, 56)])
def test_kept_tokens_show_the_bright_spot(size: tuple[int, int], spot: tuple[float, float]) -> None:
    adapter = MllamaAdapter(remove_positions(FAMILY.model()))
    with torch.no_grad():
        adapter.tower.gated_positional_embedding.embedding.zero_()
    inputs = FAMILY.inputs([[draw_spot(size, spot)]], [FAMILY.text(1)])
    for kind in ("features", "vision_features", "received_attention"):
        image = adapter.encode(inputs, OutlierReducer(kind=kind).needs).images[0]
        assert image.geometry.token_grid == (size[0] // 14, size[1] // 14)
        assert keeps_spot(OutlierReducer(2, kind=kind).reduce(image), spot)[0], kind
    if size[0] == size[1]:
        order, wrong_order = image.geometry.packed, transpose_tokens(image.geometry).packed
        flat = torch.zeros_like(image.features).flatten(0, 1)
        flat[wrong_order[wrong_order >= 0]] = image.features.flatten(0, 1)[order[order >= 0]]
        selection = OutlierReducer(2).reduce(type(image)(image.geometry, flat.view_as(image.features)))
        assert not keeps_spot(selection, spot)[0] or abs(spot[0] - spot[1]) < 0.2


def test_images_are_canvases() -> None:
    adapter = build_example(MllamaAdapter).adapter
    pixels = np.zeros((56, 112, 3), dtype=np.uint8)
    pixels[:, 56:] = 255
    inputs = FAMILY.inputs([[Image.fromarray(pixels)]], [FAMILY.text(1)])
    with torch.no_grad():
        image = adapter.encode(inputs, (), keep_pixels=1).images[0]
    assert image.pixels is not None
    assert image.pixels.shape == (1, 56, 112, 3)
    assert float(image.pixels[0, :, :50].float().mean()) < 10 < 240 < float(image.pixels[0, :, 62:].float().mean())
