"""Compare the shortening of prompts with a plain Python loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.rewrite import (
    PromptSummary,
    counted_positions,
    find_emptied_text,
    gather_position_ids,
    shorten_inputs,
    shorten_rows,
    summarize_prompts,
)

PAD = 7


@st.composite
def prompts(draw: Any) -> dict[str, Any]:
    """Draw a batch of padded prompts with placeholders, kept flags and a padding side."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    side = draw(st.sampled_from(["left", "right"]))
    real_lengths = draw(st.lists(st.integers(1, length), min_size=rows, max_size=rows))
    mask = torch.zeros(rows, length, dtype=torch.long)
    for row, count in enumerate(real_lengths):
        mask[row, length - count :] = 1 if side == "left" else 0
        if side == "right":
            mask[row, :count] = 1
    image = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)))
    placeholders = image.view(rows, length) & mask.bool()
    count = int(placeholders.sum())
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    return {"mask": mask, "placeholders": placeholders, "kept": kept, "side": side}


def count_width(prompt: dict[str, Any]) -> int:
    """Return the length of the longest reduced row."""
    remaining = prompt["mask"].bool() & ~prompt["placeholders"]
    return int(remaining.masked_scatter(prompt["placeholders"], prompt["kept"]).sum(1).max())


def shorten_with_loop(prompt: dict[str, Any], value: Tensor, fill: Any, side: str, spare: int) -> list[list[Any]]:
    """Drop positions of `value` `[rows, length]`, then pad the rows to one length."""
    rows, kept_flags = [], iter(prompt["kept"].tolist())
    for row in range(len(value)):
        remaining = []
        for position in range(value.shape[1]):
            keep = next(kept_flags) if prompt["placeholders"][row, position] else bool(prompt["mask"][row, position])
            if keep:
                remaining.append(value[row, position].item())
        rows.append(remaining)
    width = max(map(len, rows)) + spare
    padding = [[fill] * (width - len(row)) for row in rows]
    return [pad + row if side == "left" else row + pad for pad, row in zip(padding, rows, strict=True)]


@settings(max_examples=150, deadline=None)
@given(prompt=prompts(), side=st.sampled_from(["left", "right"]), spare=st.integers(0, 2))
def test_shorter_prompts_against_a_loop(prompt, side, spare) -> None:
    mask, placeholders = prompt["mask"], prompt["placeholders"]
    shape = mask.shape
    ids = torch.arange(100, 100 + mask.numel()).view(shape)
    rows = shorten_rows(placeholders, mask, prompt["kept"], side, count_width(prompt) + spare)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids + 1000,
        "token_type_ids": ids + 2000,
        "inputs_embeds": torch.stack([ids, -ids], dim=-1).float(),
        "use_cache": True,
        "mm_token_type_ids": None,
    }
    shortened = shorten_inputs(inputs, rows, PAD)
    expected_mask = shorten_with_loop(prompt, torch.ones_like(ids), 0, side, spare)
    assert shortened["input_ids"].tolist() == shorten_with_loop(prompt, ids, PAD, side, spare)
    assert shortened["attention_mask"].tolist() == expected_mask
    assert shortened["attention_mask"].dtype == torch.long
    assert shortened["labels"].tolist() == shorten_with_loop(prompt, ids + 1000, -100, side, spare)
    assert shortened["token_type_ids"].tolist() == shorten_with_loop(prompt, ids + 2000, 0, side, spare)
    assert shortened["inputs_embeds"][..., 0].tolist() == shorten_with_loop(prompt, ids, 0, side, spare)
    assert shortened["inputs_embeds"][..., 1].tolist() == shorten_with_loop(prompt, -ids, 0, side, spare)
    assert shortened["use_cache"] is True
    assert shortened["mm_token_type_ids"] is None
    expected_positions = []
    for row in expected_mask:
        real_count, positions = 0, []
        for real in row:
            real_count += real
            positions.append(max(real_count - 1, 0))
        expected_positions.append(positions)
    assert counted_positions(rows.mask).tolist() == expected_positions
    assert inputs["input_ids"] is ids  # nothing is mutated
    preserved = gather_position_ids(ids - 100, rows)
    assert preserved.tolist() == shorten_with_loop(prompt, ids - 100, 0, side, spare)
    mrope_ids = torch.stack([ids, ids * 2, ids * 3])  # M-RoPE: [3, rows, length]
    preserved = gather_position_ids(mrope_ids, rows)
    assert preserved.shape == (3, *rows.index.shape)
    assert [axis_ids.tolist() for axis_ids in preserved] == [
        shorten_with_loop(prompt, axis_ids, 0, side, spare) for axis_ids in mrope_ids
    ]


@settings(max_examples=50, deadline=None)
@given(prompt=prompts())
def test_keeping_all_tokens_returns_the_prompt(prompt) -> None:
    mask = prompt["mask"]
    ids = torch.arange(mask.numel()).view(mask.shape)
    kept = torch.ones(int(prompt["placeholders"].sum()), dtype=torch.bool)
    width = int(mask.sum(1).max())
    rows = shorten_rows(prompt["placeholders"], mask, kept, prompt["side"], width)
    shape = slice(mask.shape[1] - width, None) if prompt["side"] == "left" else slice(0, width)
    expected = ids.masked_fill(mask == 0, PAD)[:, shape]
    assert torch.equal(shorten_inputs({"input_ids": ids}, rows, PAD)["input_ids"], expected)


def test_shortening_a_prompt_by_hand() -> None:
    ids = torch.tensor([[0, 0, 5, 9, 9, 9, 6], [5, 9, 9, 9, 9, 6, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    kept = torch.tensor([False, True, False, True, False, False, True])
    rows = shorten_rows(ids == 9, mask, kept, "left", width=6)
    shortened = shorten_inputs({"input_ids": ids}, rows, 0)
    assert shortened["input_ids"].tolist() == [[0, 0, 0, 5, 9, 6], [0, 5, 9, 9, 6, 6]]
    assert shortened["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
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
    placeholders = torch.zeros(len(mask), 3, dtype=torch.bool)
    prompts = summarize_prompts(placeholders, torch.tensor(mask))
    assert prompts.padding_side(has_labels) == side
    assert prompts.tokens == tuple(map(sum, mask))


def test_summary_of_prompts() -> None:
    ids = torch.tensor([[0, 9, 9, 5, 9], [9, 5, 9, 9, 5], [5, 5, 5, 5, 5]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1] * 5, [1] * 5])
    prompts = summarize_prompts(ids == 9, mask)
    assert (prompts.placeholders, prompts.tokens, prompts.hides_images) == ((3, 3, 0), (4, 5, 5), False)
    assert prompts.find_rows([2, 1, 1, 2]) == [0, 0, 1, 1]
    assert prompts == summarize_prompts(ids == 9, mask.bool())
    assert summarize_prompts(ids == 9, None).tokens == (5, 5, 5)
    mask[1, 0] = 0
    assert summarize_prompts(ids == 9, mask).hides_images
    assert PromptSummary((0, 0, 4, 0, 2), (1,) * 5).find_rows([4, 1, 1]) == [2, 4, 4]


IMAGES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), max_size=3)
"""Images of a prompt row: the lengths of their stretches of placeholders."""


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(IMAGES, min_size=1, max_size=3), gaps=st.integers(0, 2), seed=st.integers(0, 999))
def test_text_of_emptied_stretches_against_a_loop(rows, gaps, seed) -> None:
    """Images are adjacent or have text between them; one or two text tokens follow each stretch of placeholders."""
    generator = torch.Generator().manual_seed(seed)
    lines, lengths = [], []  # of each position: (image, stretch, is a placeholder), or None outside
    for row in rows:
        line: list[Any] = [None]
        for stretches in row:
            for number, length in enumerate(stretches):
                line += [(len(lengths), number, True)] * length
                is_last = number == len(stretches) - 1
                line += (
                    []
                    if is_last
                    else [(len(lengths), number, False)] * int(torch.randint(1, 3, (), generator=generator))
                )
            lengths.append(sum(stretches))
            line += [None] * gaps
        lines.append(line)
    width = max(map(len, lines))
    lines = [[None] * (width - len(line)) + line for line in lines]
    placeholders = torch.tensor([[bool(entry and entry[2]) for entry in line] for line in lines])
    kept = torch.rand(int(placeholders.sum()), generator=generator) < 0.3
    owners = [entry for line in lines for entry in line if entry and entry[2]]
    kept_stretches = {entry[:2] for entry, keep in zip(owners, kept.tolist(), strict=True) if keep}
    for side, step in (("after", 0), ("before", 1)):
        expected = [
            [bool(entry) and not entry[2] and (entry[0], entry[1] + step) not in kept_stretches for entry in line]
            for line in lines
        ]
        assert find_emptied_text(placeholders, kept, lengths, side).tolist() == expected
    assert not find_emptied_text(placeholders, kept, lengths, "none").any()
