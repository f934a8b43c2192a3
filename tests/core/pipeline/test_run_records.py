"""A run records kept positions and selections, has a bounded size, and does not hold the model."""

from __future__ import annotations

import gc
import weakref
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.oracle import kept_mask
from tokenprune import Run, TileGeometry, align
from tokenprune.account import HISTORY
from tokenprune.adapter import find_adapter
from tokenprune.rewrite import Rows
from tokenprune.run import DRAWABLE
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED, PruMerge, VisionZip
from tokenprune.testing.tiny_models import batch, tiny_model


@torch.no_grad()
def test_the_run_records_the_remaining_positions(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model) as run:
        assert run.rows is None
        model(**inputs)
    assert run.rows is not None
    kept = kept_mask(model, inputs, run)
    for row in range(len(kept)):
        assert run.rows.index[row][run.rows.mask[row]].tolist() == kept[row].nonzero()[:, 0].tolist()
    short = align(inputs["input_ids"], run.rows, fill=-1)
    assert short.shape == run.rows.index.shape
    assert torch.equal(
        short[run.rows.mask],
        torch.cat([ids[row_kept] for ids, row_kept in zip(inputs["input_ids"], kept, strict=True)]),
    )
    assert (short[~run.rows.mask] == -1).all()
    with pytest.raises(ValueError, match="align needs a tensor of the full prompt"):
        align(short, run.rows)
    with HiRED(1.0)(model) as run:
        model(**inputs)
    assert run.rows is not None
    assert torch.equal(align(inputs["input_ids"], run.rows), inputs["input_ids"])


def test_a_run_does_not_hold_the_model(inputs: Any) -> None:
    model = tiny_model("llava_next")
    with HiRED(0.2)(model) as run:
        model.generate(**inputs, max_new_tokens=1)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert run.account.image_count == 3


@pytest.mark.parametrize("reducer", [HiRED(0.2), VisionZip(0.2), PruMerge(0.2)], ids=lambda r: type(r).__name__)
@torch.no_grad()
def test_later_selections_are_compact(model: Any, reducer: Any) -> None:
    call = batch("llava_next", [(112, 112)])
    with reducer(model) as run:
        for _ in range(DRAWABLE + 2):
            model(**call)
    first, last = run.selections[0], run.selections[-1]
    assert first.pixels is not None
    assert last.pixels is None
    assert last.scores is None
    assert last.mixing is None
    assert torch.equal(first.kept, last.kept)
    tensors = [value for field in fields(last) if isinstance(value := getattr(last, field.name), Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) < 4096


def test_a_run_is_bounded(model: Any) -> None:
    layout = TileGeometry.single((2, 2))
    selection = Selection(layout, torch.ones(1, 4, dtype=torch.bool), asked=4)
    run = Run("HiRED", find_adapter(model).llm)
    for _ in range(HISTORY + 50):
        run.add([selection], Rows.unchanged(torch.ones(1, 6)), [(6, 6)])
    assert len(run.selections) == len(run.account.images) == len(run.account.prompt_lengths) == HISTORY
    assert run.account.image_count == run.account.row_count == HISTORY + 50
    assert run.account.kept == 4 * (HISTORY + 50)
