"""The account of a run: exact totals, bounded memory, and one prompt length per layer of the LLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.account import HISTORY, RowLengths, TokenAccount, kv_bytes, prefill_flops
from tokenprune.adapter import LLMShape
from tokenprune.geometry import TileGeometry
from tokenprune.selection import Selection

SHAPE = LLMShape(heads=4, kv_heads=2, head_dim=8, layer_parameters=(100, 200, 300), head_parameters=50, element_bytes=2)
LAYOUT = TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56)  # 80 tokens, 8 newlines
ROWS = st.lists(st.tuples(st.integers(1, 4000), st.tuples(*[st.integers(0, 4000)] * 3)), min_size=1, max_size=6)


def selection(kept: int, asked: int | None = None, newlines: int = 0) -> Selection:
    mask = (torch.arange(LAYOUT.tiles * LAYOUT.tokens) < kept).view(LAYOUT.tiles, LAYOUT.tokens)
    newline_mask = torch.arange(LAYOUT.newlines) < newlines
    return Selection(LAYOUT, mask, kept if asked is None else asked, newline_mask=newline_mask)


@settings(deadline=None)
@given(rows=ROWS)
def test_layers_are_summed_exactly(rows: list[tuple[int, tuple[int, ...]]]) -> None:
    account = TokenAccount(SHAPE)
    account.add([], [RowLengths(full, layers) for full, layers in rows])
    assert account.kv_bytes == sum(2 * 2 * 8 * 2 * sum(layers) for _, layers in rows)
    assert account.flops == sum(
        sum(2 * weights * n + 4 * 4 * 8 * n * n for weights, n in zip(SHAPE.layer_parameters, layers, strict=True))
        + 2 * 50
        for _, layers in rows
    )
    assert account.tokens_per_layer == [sum(layers[layer] for _, layers in rows) for layer in range(3)]
    assert account.prompt_length == sum(layers[0] for _, layers in rows)
    assert account.kv_bytes_full == sum(kv_bytes(SHAPE, full) for full, _ in rows)
    assert account.flops_full == sum(prefill_flops(SHAPE, full) for full, _ in rows)


@given(length=st.integers(0, 10_000))
def test_equal_lengths_follow_the_closed_formula(length: int) -> None:
    assert kv_bytes(SHAPE, length) == 2 * SHAPE.layers * 2 * 8 * 2 * length
    assert prefill_flops(SHAPE, length) == 2 * 600 * length + 4 * 3 * 4 * 8 * length * length + 2 * 50
    pairs, rows = TokenAccount(SHAPE), TokenAccount(SHAPE)
    pairs.add([], [(20_000, length)])
    rows.add([], [RowLengths(20_000, (length,) * 3)])
    assert pairs.summary() == rows.summary()
    assert pairs.flops == prefill_flops(SHAPE, length)


def test_a_row_unpacks_as_full_and_reduced() -> None:
    full, reduced = lengths = RowLengths(100, (60, 60, 20))
    assert (full, reduced, lengths.reduced, lengths.layers) == (100, 60, 60, (60, 60, 20))
    account = TokenAccount(SHAPE)
    account.add([selection(40)], [lengths, (50, 30)])
    assert [(before, after) for before, after in account.prompt_lengths] == [(100, 60), (50, 30)]
    assert account.prompt_lengths[1] == RowLengths(50, (30, 30, 30))


def test_a_row_has_one_length_per_layer() -> None:
    account = TokenAccount(SHAPE)
    with pytest.raises(ValueError, match="lengths for 2 layers, but the LLM has 3"):
        account.add([selection(4)], [(9, 9), RowLengths(100, (60, 20))])
    assert (account.image_count, account.row_count) == (0, 0)  # a refused call stores nothing


def test_totals_cover_more_than_the_history() -> None:
    account, calls = TokenAccount(SHAPE), HISTORY + 37
    for number in range(calls):
        account.add([selection(3, asked=5), selection(1, newlines=2)], [(200 + number, 100), (90, 80)])
    assert (len(account.images), len(account.prompt_lengths)) == (HISTORY, HISTORY)
    assert (account.image_count, account.row_count) == (2 * calls, 2 * calls)
    assert account.images[-1].kept == 1
    assert account.prompt_lengths[-2] == RowLengths(200 + calls - 1, (100,) * 3)
    assert account.flops == calls * (prefill_flops(SHAPE, 100) + prefill_flops(SHAPE, 80))
    full = sum(200 + number + 90 for number in range(calls))
    assert account.summary() == {
        "images": 2 * calls,
        "asked": 6 * calls,
        "kept": 4 * calls,
        "valid": 160 * calls,
        "newlines": 2 * calls,
        "average_tokens": 2.0,
        "cuts": [],
        "prompts": 2 * calls,
        "prompt_length": 180 * calls,
        "prompt_length_full": full,
        "kv_bytes": calls * kv_bytes(SHAPE, 180),
        "kv_bytes_full": kv_bytes(SHAPE, full),
        "prefill_flops": account.flops,
        "prefill_flops_full": account.flops_full,
        "saliency_flops": 0,
        "signal_flops": 0,
        "tower_patches": 0,
        "tower_patches_full": 0,
        "attention": None,
    }


def test_average_tokens_are_the_visual_tokens_of_a_row() -> None:
    account = TokenAccount(SHAPE)
    assert account.average_tokens == 0.0
    account.add([selection(40, newlines=4)], [(100, 60)])  # before the LLM: 40 in every layer
    assert account.average_tokens == 40
    cut = {2: [selection(20, newlines=2)]}  # inside it: 80, 80, 20
    account.add([selection(80, newlines=8)], [RowLengths(100, (100, 100, 34))], cut)
    assert account.average_tokens == (40 + 60) / 2


def test_average_tokens_average_over_layers() -> None:
    """FastV on LLaVA-1.5: 576 visual tokens in the first 2 layers of 32 and half of them afterwards."""
    visual, text = 576, 64
    geometry = TileGeometry((0, 0), (24, 24), torch.zeros(0, 4), torch.arange(visual))
    kept = torch.ones(1, visual, dtype=torch.bool)
    shape = replace(SHAPE, layer_parameters=(100,) * 32)
    account = TokenAccount(shape)
    layers = (visual + text,) * 2 + (visual // 2 + text,) * 30
    full_selection = Selection(geometry, kept, visual, newline_mask=torch.zeros(0, dtype=torch.bool))
    half = replace(full_selection, kept=torch.arange(visual)[None] < visual // 2)
    account.add([full_selection], [RowLengths(visual + text, layers)], {2: [half]})
    assert account.average_tokens == pytest.approx(visual * (2 + 0.5 * 30) / 32)


def test_text_of_an_account() -> None:
    account = TokenAccount(SHAPE, attention="cls_attention")
    assert str(account) == "no image was reduced"
    account.add([selection(16)], [(100, 36)])
    assert str(account).startswith("1 image: 16 tokens asked, 16 kept of 80 valid; KV cache 36.0% and prefill FLOPs ")
    assert str(account).endswith("of full; attention: cls_attention")
    account.add([selection(80, asked=160)], [(100, 100)])
    assert str(account).startswith("2 images: 176 tokens asked, 96 kept of 160 valid; ")


def test_cuts_are_summed_by_layer() -> None:
    account = TokenAccount(SHAPE)
    for _ in range(HISTORY + 5):
        account.add(
            [selection(80)], [RowLengths(100, (100, 60, 40))], {2: [selection(20, asked=25)], 1: [selection(40)]}
        )
    assert list(account.cuts) == [1, 2]
    assert account.summary()["cuts"] == [
        {"layer": 1, "asked": 40 * (HISTORY + 5), "kept": 40 * (HISTORY + 5)},
        {"layer": 2, "asked": 25 * (HISTORY + 5), "kept": 20 * (HISTORY + 5)},
    ]
    single = TokenAccount(SHAPE)
    single.add([selection(80)], [RowLengths(100, (100, 60, 40))], {1: [selection(40)], 2: [selection(20, asked=25)]})
    assert str(single).startswith(
        "1 image: 80 tokens asked, 80 kept of 80 valid; from layer 1: 40 asked, 40 kept; "
        "from layer 2: 25 asked, 20 kept; 46.7 visual tokens per prompt on average over 3 layers; KV cache "
    )
