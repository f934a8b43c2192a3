"""Test top-k selection, newline tokens and the masks of a selection."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.selection import Selection, kept_newlines, top_of_image, top_per_tile

INF = float("inf")


def keep_top_by_sorting(scores: list[float], budget: int, candidates: list[bool]) -> list[bool]:
    order = sorted((i for i, is_candidate in enumerate(candidates) if is_candidate), key=lambda i: (-scores[i], i))
    return [i in order[:budget] for i in range(len(scores))]


@settings(deadline=None)
@given(data=st.data(), tiles=st.integers(1, 4), tokens=st.integers(1, 8))
def test_top_per_tile_and_of_image_against_sorting(data, tiles: int, tokens: int) -> None:
    """Masks equal those from sorting, with frequent ties and with scores of -inf."""
    values = st.sampled_from([-INF, -1.0, 0.0, 0.5, 2.0, 3e38])
    scores = data.draw(hnp.arrays("float32", (tiles, tokens), elements=values)).tolist()
    candidates = data.draw(hnp.arrays(bool, (tiles, tokens))).tolist()
    budgets = data.draw(st.lists(st.integers(0, tokens + 1), min_size=tiles, max_size=tiles))
    kept = top_per_tile(torch.tensor(scores), torch.tensor(budgets), torch.tensor(candidates))
    assert kept.tolist() == [keep_top_by_sorting(*row) for row in zip(scores, budgets, candidates, strict=True)]
    total = sum(budgets)
    pool = top_of_image(torch.tensor(scores), total, torch.tensor(candidates))
    flat_scores, flat_candidates = list(chain(*scores)), list(chain(*candidates))
    assert pool.flatten().tolist() == keep_top_by_sorting(flat_scores, total, flat_candidates)


def test_a_candidate_of_score_minus_infinity_precedes_tokens_that_are_no_candidates() -> None:
    scores = torch.full((1, 4), -INF)
    candidates = torch.tensor([[False, True, False, True]])
    assert top_per_tile(scores, torch.tensor([1]), candidates).tolist() == [[False, True, False, False]]
    assert top_of_image(scores, 2, candidates).tolist() == [[False, True, False, True]]


def test_ties_go_to_the_lower_index_in_long_rows() -> None:
    """The row has 576 equal scores, because an unstable sort can keep short rows in order by accident."""
    scores = torch.zeros(2, 576)
    kept = top_per_tile(scores, torch.tensor([100, 0]), torch.ones(2, 576, dtype=torch.bool))
    assert kept[0].nonzero().flatten().tolist() == list(range(100))
    assert not kept[1].any()


LAYOUTS = {
    "anyres": TileGeometry.anyres((100, 41), (2, 1), (4, 4), 56),
    "padded": TileGeometry.anyres((20, 100), (1, 2), (4, 4), 56),
    "square": TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56),
    "one newline at the end": TileGeometry((0, 0), (2, 2), torch.zeros(0, 4), torch.tensor([0, 1, 2, 3, NEWLINE])),
    "rows of one tile": TileGeometry((0, 0), (2, 2), torch.zeros(0, 4), torch.tensor([0, 1, NEWLINE, 2, 3, NEWLINE])),
    "base tile last": TileGeometry(
        (1, 1), (2, 2), torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([4, 5, NEWLINE, 6, 7, NEWLINE, 0, 1, 2, 3])
    ),
    "no newlines": TileGeometry.single((3, 3)),
}


def find_newlines_by_loop(layout: TileGeometry) -> list[int]:
    """Return the index of the next newline token of each packed entry, or -1 for tokens of the base tile."""
    entries, newline_indices = layout.packed.tolist(), []
    for position, entry in enumerate(entries):
        newline_index = entries[:position].count(NEWLINE)
        if entry == NEWLINE:
            newline_indices.append(newline_index)
        elif NEWLINE not in entries[position:] or (layout.sub_images and entry < layout.tokens):
            newline_indices.append(-1)
        else:
            newline_indices.append(newline_index)
    return newline_indices


@pytest.mark.parametrize("name", LAYOUTS)
def test_newline_index(name: str) -> None:
    assert LAYOUTS[name].newline_index.tolist() == find_newlines_by_loop(LAYOUTS[name])


def test_newline_index_by_hand() -> None:
    layout = TileGeometry.anyres((10, 20), (1, 2), (2, 2), 10)
    assert layout.newline_index.tolist() == [-1, -1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert LAYOUTS["rows of one tile"].newline_index.tolist() == [0, 0, 0, 1, 1, 1]
    assert LAYOUTS["base tile last"].newline_index.tolist() == [0, 0, 0, 1, 1, 1, -1, -1, -1, -1]


@settings(deadline=None)
@given(name=st.sampled_from(sorted(LAYOUTS)), data=st.data())
def test_kept_newlines_and_packed_mask_against_a_loop(name: str, data) -> None:
    layout = LAYOUTS[name]
    kept = torch.tensor(data.draw(hnp.arrays(bool, (layout.tiles, layout.tokens)))) & layout.valid
    row_of = find_newlines_by_loop(layout)
    flat = kept.flatten().tolist()
    entries = layout.packed.tolist()
    for policy in ("keep", "drop", "keep_rows"):
        newline_mask = kept_newlines(layout, kept, policy)
        rows = {row_of[i] for i, entry in enumerate(entries) if entry != NEWLINE and flat[entry]} - {-1}
        expected = {"keep": set(range(layout.newlines)), "drop": set(), "keep_rows": rows}[policy]
        assert set(newline_mask.nonzero().flatten().tolist()) == expected
        assert newline_mask.dtype == torch.bool
        assert len(newline_mask) == layout.newlines
        selection = Selection(layout, kept, 5, newline_mask=newline_mask)
        expected_mask, newline_index = [], 0
        for entry in entries:
            expected_mask.append(newline_index in expected if entry == NEWLINE else flat[entry])
            newline_index += entry == NEWLINE
        assert selection.packed_mask().tolist() == expected_mask
        assert selection.kept_tokens + selection.kept_newlines == sum(expected_mask)
        assert selection.is_identity == all(expected_mask)


def test_selection_counts() -> None:
    layout = LAYOUTS["square"]
    kept = torch.zeros(5, 16, dtype=torch.bool)
    kept[0, :3] = kept[4, 15] = True
    selection = Selection(layout, kept, 9)
    assert selection.kept_per_tile == [3, 0, 0, 0, 1]
    assert selection.granted_per_tile == [3, 0, 0, 0, 1]
    assert Selection(layout, kept, 9, budgets=torch.tensor([4, 0, 0, 0, 5])).granted_per_tile == [4, 0, 0, 0, 5]
    assert selection.kept_newlines == 0
    assert int(selection.packed_mask().sum()) == 4
    assert not selection.is_identity
    assert Selection(layout, layout.valid, 80, newline_mask=torch.ones(8, dtype=torch.bool)).is_identity
    assert not Selection(layout, layout.valid, 80).is_identity  # the newline tokens are dropped


def test_a_selection_with_mixing_is_not_everything() -> None:
    layout = TileGeometry.single((2, 2))
    assert Selection(layout, layout.valid, 4).is_identity
    assert not Selection(layout, layout.valid, 4, mixing=torch.eye(4)).is_identity


def test_unknown_newline_policy() -> None:
    with pytest.raises(ValueError, match="newlines='rows' is not known"):
        kept_newlines(LAYOUTS["square"], LAYOUTS["square"].valid, "rows")  # type: ignore[arg-type]
