"""Shorter prompts against a plain Python loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.rewrite import (
    counted_positions,
    find_emptied_text,
    gather_position_ids,
    infer_padding_side,
    shorten_inputs,
    shorten_rows,
)

PAD = 7


@st.composite
def prompts(draw: Any) -> dict[str, Any]:
    """A batch of padded prompts in which some positions are placeholders; every row keeps something."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    side = draw(st.sampled_from(["left", "right"]))
    real = draw(st.lists(st.integers(1, length), min_size=rows, max_size=rows))
    mask = torch.zeros(rows, length, dtype=torch.long)
    for row, number in enumerate(real):
        mask[row, length - number :] = 1 if side == "left" else 0
        if side == "right":
            mask[row, :number] = 1
    image = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)))
    placeholders = image.view(rows, length) & mask.bool()
    number = int(placeholders.sum())
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=number, max_size=number)), dtype=torch.bool)
    return {"mask": mask, "placeholders": placeholders, "kept": kept, "side": side}


def slow(prompt: dict[str, Any], value: Tensor, fill: Any, side: str, spare: int) -> list[list[Any]]:
    """Keep, then pad; `value` is `[rows, length]`."""
    rows, taken = [], iter(prompt["kept"].tolist())
    for row in range(len(value)):
        stays = []
        for position in range(value.shape[1]):
            keep = next(taken) if prompt["placeholders"][row, position] else bool(prompt["mask"][row, position])
            if keep:
                stays.append(value[row, position].item())
        rows.append(stays)
    width = max(map(len, rows)) + spare
    pad = [[fill] * (width - len(row)) for row in rows]
    return [p + row if side == "left" else row + p for p, row in zip(pad, rows, strict=True)]


@settings(max_examples=150, deadline=None)
@given(prompt=prompts(), side=st.sampled_from(["left", "right"]), spare=st.integers(0, 2))
def test_shorter_prompts_against_a_loop(prompt, side, spare) -> None:
    mask, placeholders = prompt["mask"], prompt["placeholders"]
    shape = mask.shape
    ids = torch.arange(100, 100 + mask.numel()).view(shape)
    rows = shorten_rows(placeholders, mask, prompt["kept"], side, spare)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids + 1000,
        "token_type_ids": ids + 2000,
        "inputs_embeds": torch.stack([ids, -ids], dim=-1).float(),
        "use_cache": True,
        "mm_token_type_ids": None,
    }
    out = shorten_inputs(inputs, rows, PAD)
    expected_mask = slow(prompt, torch.ones_like(ids), 0, side, spare)
    assert out["input_ids"].tolist() == slow(prompt, ids, PAD, side, spare)
    assert out["attention_mask"].tolist() == expected_mask
    assert out["attention_mask"].dtype == torch.long
    assert out["labels"].tolist() == slow(prompt, ids + 1000, -100, side, spare)
    assert out["token_type_ids"].tolist() == slow(prompt, ids + 2000, 0, side, spare)
    assert out["inputs_embeds"][..., 0].tolist() == slow(prompt, ids, 0, side, spare)
    assert out["inputs_embeds"][..., 1].tolist() == slow(prompt, -ids, 0, side, spare)
    assert out["use_cache"] is True
    assert out["mm_token_type_ids"] is None
    counted = []
    for row in expected_mask:
        seen, positions = 0, []
        for real in row:
            seen += real
            positions.append(max(seen - 1, 0))
        counted.append(positions)
    assert counted_positions(rows.mask).tolist() == counted
    assert inputs["input_ids"] is ids  # nothing is mutated
    preserved = gather_position_ids(ids - 100, rows)
    assert preserved.tolist() == slow(prompt, ids - 100, 0, side, spare)
    three = torch.stack([ids, ids * 2, ids * 3])  # M-RoPE: [3, rows, length]
    preserved = gather_position_ids(three, rows)
    assert preserved.shape == (3, *rows.index.shape)
    assert [one.tolist() for one in preserved] == [slow(prompt, one, 0, side, spare) for one in three]


@settings(max_examples=50, deadline=None)
@given(prompt=prompts())
def test_keeping_everything_gives_the_prompt_back(prompt) -> None:
    mask = prompt["mask"]
    ids = torch.arange(mask.numel()).view(mask.shape)
    everything = torch.ones(int(prompt["placeholders"].sum()), dtype=torch.bool)
    rows = shorten_rows(prompt["placeholders"], mask, everything, prompt["side"])
    width = int(mask.sum(1).max())
    shape = slice(mask.shape[1] - width, None) if prompt["side"] == "left" else slice(0, width)
    expected = ids.masked_fill(mask == 0, PAD)[:, shape]
    assert torch.equal(shorten_inputs({"input_ids": ids}, rows, PAD)["input_ids"], expected)


def test_by_hand() -> None:
    ids = torch.tensor([[0, 0, 5, 9, 9, 9, 6], [5, 9, 9, 9, 9, 6, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    kept = torch.tensor([False, True, False, True, False, False, True])
    rows = shorten_rows(ids == 9, mask, kept, "left", spare=1)
    out = shorten_inputs({"input_ids": ids}, rows, 0)
    assert out["input_ids"].tolist() == [[0, 0, 0, 5, 9, 6], [0, 5, 9, 9, 6, 6]]
    assert out["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert gather_position_ids(torch.arange(7).expand(2, 7), rows).tolist() == [[0, 0, 0, 2, 4, 6], [0, 0, 1, 4, 5, 6]]


@pytest.mark.parametrize(
    ("mask", "has_labels", "side"),
    [
        ([[0, 1, 1], [1, 1, 1]], False, "left"),
        ([[0, 1, 1], [1, 1, 1]], True, "left"),
        ([[1, 1, 0], [1, 1, 1]], False, "right"),
        ([[1, 1, 0], [1, 1, 1]], True, "right"),
        ([[1, 1, 1]], False, "left"),
        ([[1, 1, 1]], True, "right"),
    ],
)
def test_padding_side(mask: list[list[int]], has_labels: bool, side: str) -> None:
    assert infer_padding_side(torch.tensor(mask), has_labels) == side


IMAGES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), max_size=3)
"""Images of a prompt row: the lengths of their stretches of placeholders."""


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(IMAGES, min_size=1, max_size=3), gaps=st.integers(0, 2), seed=st.integers(0, 999))
def test_text_of_emptied_stretches_against_a_loop(rows, gaps, seed) -> None:
    """Images stand side by side (no gap) or with text between; a stretch is followed by one or two of text."""
    generator = torch.Generator().manual_seed(seed)
    written, lengths = [], []  # of each position: (image, stretch, is a placeholder), or None outside
    for row in rows:
        line: list[Any] = [None]
        for stretches in row:
            for number, length in enumerate(stretches):
                line += [(len(lengths), number, True)] * length
                last = number == len(stretches) - 1
                line += (
                    [] if last else [(len(lengths), number, False)] * int(torch.randint(1, 3, (), generator=generator))
                )
            lengths.append(sum(stretches))
            line += [None] * gaps
        written.append(line)
    width = max(map(len, written))
    written = [[None] * (width - len(line)) + line for line in written]
    placeholders = torch.tensor([[bool(one and one[2]) for one in line] for line in written])
    kept = torch.rand(int(placeholders.sum()), generator=generator) < 0.3
    owners = [one for line in written for one in line if one and one[2]]
    alive = {one[:2] for one, keep in zip(owners, kept.tolist(), strict=True) if keep}
    for side, step in (("after", 0), ("before", 1)):
        expected = [
            [bool(one) and not one[2] and (one[0], one[1] + step) not in alive for one in line] for line in written
        ]
        assert find_emptied_text(placeholders, kept, lengths, side).tolist() == expected
    assert not find_emptied_text(placeholders, kept, lengths, "none").any()
