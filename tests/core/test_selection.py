from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenprune.image import NEWLINE, TileGeometry
from tokenprune.selection import Selection, kept_newlines, top_of_image, top_per_tile

INF = float("inf")


def slow_top(scores: list[float], budget: int, candidates: list[bool]) -> list[bool]:
    order = sorted((i for i, may in enumerate(candidates) if may), key=lambda i: (-scores[i], i))
    return [i in order[:budget] for i in range(len(scores))]


@settings(deadline=None)
@given(data=st.data(), tiles=st.integers(1, 4), tokens=st.integers(1, 8))
def test_top_per_tile_and_of_image_against_sorting(data, tiles: int, tokens: int) -> None:
    """Few distinct values, so that ties are common; -inf is a score like any other."""
    values = st.sampled_from([-INF, -1.0, 0.0, 0.5, 2.0, 3e38])
    scores = data.draw(hnp.arrays("float32", (tiles, tokens), elements=values)).tolist()
    candidates = data.draw(hnp.arrays(bool, (tiles, tokens))).tolist()
    budgets = data.draw(st.lists(st.integers(0, tokens + 1), min_size=tiles, max_size=tiles))
    kept = top_per_tile(torch.tensor(scores), torch.tensor(budgets), torch.tensor(candidates))
    assert kept.tolist() == [slow_top(*row) for row in zip(scores, budgets, candidates, strict=True)]
    total = sum(budgets)
    pool = top_of_image(torch.tensor(scores), total, torch.tensor(candidates))
    flat_scores, flat_candidates = list(chain(*scores)), list(chain(*candidates))
    assert pool.flatten().tolist() == slow_top(flat_scores, total, flat_candidates)


def test_a_candidate_of_score_minus_infinity_comes_before_what_is_no_candidate() -> None:
    scores = torch.full((1, 4), -INF)
    candidates = torch.tensor([[False, True, False, True]])
    assert top_per_tile(scores, torch.tensor([1]), candidates).tolist() == [[False, True, False, False]]
    assert top_of_image(scores, 2, candidates).tolist() == [[False, True, False, True]]


def test_ties_go_to_the_lower_index_in_long_rows() -> None:
    """Unstable sorts keep short rows in order by accident; 576 equal scores do not stay in order."""
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


def slow_separator_of(layout: TileGeometry) -> list[int]:
    """Walk along the prompt; a token's separator is the next one, unless the token is of the base tile."""
    places, answer = layout.packed.tolist(), []
    for position, place in enumerate(places):
        before = places[:position].count(NEWLINE)
        if place == NEWLINE:
            answer.append(before)
        elif NEWLINE not in places[position:] or (layout.sub_images and place < layout.tokens):
            answer.append(-1)
        else:
            answer.append(before)
    return answer


@pytest.mark.parametrize("name", LAYOUTS)
def test_separator_of(name: str) -> None:
    assert LAYOUTS[name].newline_of.tolist() == slow_separator_of(LAYOUTS[name])


def test_separator_of_by_hand() -> None:
    layout = TileGeometry.anyres((10, 20), (1, 2), (2, 2), 10)
    assert layout.newline_of.tolist() == [-1, -1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert LAYOUTS["rows of one tile"].newline_of.tolist() == [0, 0, 0, 1, 1, 1]
    assert LAYOUTS["base tile last"].newline_of.tolist() == [0, 0, 0, 1, 1, 1, -1, -1, -1, -1]


@settings(deadline=None)
@given(name=st.sampled_from(sorted(LAYOUTS)), data=st.data())
def test_kept_separators_and_packed_mask_against_a_walk_along_the_prompt(name: str, data) -> None:
    layout = LAYOUTS[name]
    kept = torch.tensor(data.draw(hnp.arrays(bool, (layout.tiles, layout.tokens)))) & layout.valid
    newline_of = slow_separator_of(layout)
    flat = kept.flatten().tolist()
    places = layout.packed.tolist()
    for policy in ("keep", "drop", "keep_rows"):
        stays = kept_newlines(layout, kept, policy)
        rows = {newline_of[i] for i, place in enumerate(places) if place != NEWLINE and flat[place]} - {-1}
        expected = {"keep": set(range(layout.newlines)), "drop": set(), "keep_rows": rows}[policy]
        assert set(stays.nonzero().flatten().tolist()) == expected
        assert stays.dtype == torch.bool
        assert len(stays) == layout.newlines
        selection = Selection(layout, kept, 5, newline_mask=stays)
        walk, seen = [], 0
        for place in places:
            walk.append(seen in expected if place == NEWLINE else flat[place])
            seen += place == NEWLINE
        assert selection.packed_mask().tolist() == walk
        assert selection.kept_tokens + selection.kept_newlines == sum(walk)
        assert selection.everything == all(walk)


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
    assert not selection.everything
    assert Selection(layout, layout.valid, 80, newline_mask=torch.ones(8, dtype=torch.bool)).everything
    assert not Selection(layout, layout.valid, 80).everything  # the newlines are gone


def test_a_selection_that_mixes_is_never_everything() -> None:
    layout = TileGeometry.single((2, 2))
    assert Selection(layout, layout.valid, 4).everything
    assert not Selection(layout, layout.valid, 4, mixing=torch.eye(4)).everything


def test_unknown_newline_policy() -> None:
    with pytest.raises(ValueError, match="newlines='rows' is not known"):
        kept_newlines(LAYOUTS["square"], LAYOUTS["square"].valid, "rows")  # type: ignore[arg-type]
