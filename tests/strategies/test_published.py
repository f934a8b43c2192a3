"""Published methods against outputs recorded from their official implementations; each test says what is compared.

The recorded arrays cover images of several tiles of 24 x 24 tokens; releases choose among all of them, padding
included, so layouts here have no padding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.published import CASES, Case
from tokenprune.budget import Budget
from tokenprune.catalog import strategies
from tokenprune.image import EncodedImage, TileGeometry
from tokenprune.models._capture.attention import joint_row
from tokenprune.selection import Selection
from tokenprune.strategies import (
    EADP,
    HERO,
    SCOPE,
    TRIM,
    CDPruner,
    DivPrune,
    FasterVLM,
    GlobalCom2,
    HiPrune,
    HoloV,
    PruMerge,
    PruMergePlus,
    VisionZip,
    VisPruner,
)
from tokenprune.strategies.components.allocation import ScoreMassAllocation
from tokenprune.strategies.components.diversity import (
    facility_location,
    greedy_dpp,
    important_then_diverse,
    max_min_diverse,
    saliency_coverage,
)
from tokenprune.strategies.eadp import FacilityLocationSelection
from tokenprune.strategies.hero import EarlyLateAttentionSelection
from tokenprune.testing.encoded_images import random_encoded_image

TOKENS = 576


def image(tiles: int, signals: dict[tuple[str, int], torch.Tensor]) -> EncodedImage:
    """An image of a 24-layer tower in which every token is valid; the tile grid is a row of sub-images."""
    geometry = TileGeometry(
        (1, tiles - 1) if tiles > 1 else (0, 0), (24, 24), torch.zeros(tiles - 1, 4), torch.arange(tiles * TOKENS)
    )
    return EncodedImage(geometry, torch.zeros(tiles, TOKENS, 1), signals, layers=24, feature_layer=22)


@pytest.mark.parametrize("number", CASES)
def test_fastervlm_release(number: int) -> None:
    case = Case("fastervlm", number)
    one = image(len(case["attention"]), {("cls_attention", 22): case["attention"]})
    kept = FasterVLM.release(Budget(case["budget"], per="tile")).reduce(one).kept
    assert torch.equal(kept, case["kept"])


@pytest.mark.parametrize("number", CASES)
def test_hiprune_release(number: int) -> None:
    case = Case("hiprune", number)
    signals = {
        ("received_attention", 8): case["object_attention"][:, None],
        ("received_attention", 22): case["deep_attention"][:, None],
    }
    one = image(len(case["kept"]), signals)
    assert torch.equal(HiPrune.release(case["total_budget"], case["alpha"]).reduce(one).kept, case["kept"])


@pytest.mark.parametrize("number", CASES)
def test_scope_release(number: int) -> None:
    """The kept tokens, and the order of picking in every tile."""
    case = Case("scope", number)
    signals = {("cls_attention", 22): case["attention"], ("vision_features", 22): case["features"]}
    one = image(len(case["attention"]), signals)
    assert torch.equal(SCOPE.release(case["total_budget"], case["alpha"]).reduce(one).kept, case["kept"])
    for tile, picks in enumerate(case["selected"]):
        saliency = case["attention"][tile].sum(0) ** case["alpha"]
        assert saliency_coverage(case["features"][tile], saliency, len(picks)).tolist() == picks.tolist()


@pytest.mark.parametrize("number", CASES)
def test_vispruner_release(number: int) -> None:
    """The kept tokens, and the important ones in their order."""
    case = Case("vispruner", number)
    signals = {("cls_attention", 22): case["attention"], ("vision_features", 22): case["features"]}
    one = image(len(case["attention"]), signals)
    reducer = VisPruner.release(Budget(case["budget"], per="tile"), case["important_ratio"])
    assert torch.equal(reducer.reduce(one).kept, case["kept"])
    for tile, important in enumerate(case["important"]):
        found = important_then_diverse(
            case["features"][tile], case["attention"][tile].mean(0), case["budget"], len(important)
        )
        assert found[: len(important)].tolist() == important.tolist()


@pytest.mark.parametrize("number", CASES)
def test_divprune_release(number: int) -> None:
    """The kept tokens, how many newlines are among them, and the order of picking.

    Recorded newline rows are one vector again and again, so any of them will do.
    """
    case = Case("divprune", number)
    features = case["features"]
    number_kept = round(case["ratio"] * len(features))
    same = (features[:, None] == features[None]).all(-1).int().argmax(dim=1)  # the first row of equal ones
    picks = max_min_diverse(features, number_kept)
    assert same[picks].tolist() == same[case["selected"].long()].tolist()
    newline = same != torch.arange(len(features))
    newline |= torch.isin(torch.arange(len(features)), same[newline])
    assert int(newline.sum()) == (len(features) // 30 if len(features) in (900, 1000) else 0)
    packed = torch.where(newline, -1, torch.cumsum(~newline, dim=0) - 1)
    tokens = features[~newline]
    layout = TileGeometry((0, 0), (1, len(tokens)), torch.zeros(0, 4), packed)
    one = EncodedImage(layout, tokens[None], newline=features[newline][0] if bool(newline.any()) else None)
    selection = DivPrune.release(case["ratio"]).reduce(one)
    expected = case["kept"].long()
    assert selection.asked == number_kept == selection.kept_tokens + selection.kept_newlines
    assert selection.kept_newlines == int(newline[expected].sum())
    assert packed[selection.packed_mask() & ~newline].tolist() == packed[expected][packed[expected] >= 0].tolist()


@pytest.mark.parametrize("number", CASES)
def test_globalcom2_release(number: int) -> None:
    """The kept tokens at their true places, on the true layout; the release places them elsewhere where it unpads."""
    case = Case("globalcom2", number)
    height, width = case["image_size"].tolist()
    rows, cols = case["grid"].tolist()
    layout = TileGeometry.anyres((height, width), (rows, cols), (24, 24), 336)
    signals = {("cls_logits", 23): case["cls_logits"][:, None]}
    one = EncodedImage(layout, torch.zeros(layout.tiles, TOKENS, 1), signals, layers=24, feature_layer=22)
    selection = GlobalCom2.release(case["retention"]).reduce(one)
    assert selection.granted_per_tile == case["counts"].tolist()
    assert torch.equal(selection.kept, case["kept"])
    assert selection.order is not None
    base = selection.kept[0].nonzero()[:, 0]
    assert base[selection.order[: len(base)]].tolist() == case["thumbnail_order"].tolist()


@pytest.mark.parametrize("number", CASES)
def test_holov_release(number: int) -> None:
    """The kept tokens; places that the release fills with zero vectors are missing here."""
    case = Case("holov", number)
    length = len(case["attention"])
    geometry = TileGeometry((1, 1), (1, length), torch.zeros(1, 4), torch.arange(length, 2 * length))  # one pool
    attention = torch.cat([torch.zeros(1, 1, length), case["attention"][None, None]])
    one = EncodedImage(geometry, torch.zeros(2, length, 1), {("cls_attention", 22): attention}, 24, 22)
    selection = HoloV.release(case["budget"], case["stripes"]).reduce(one)
    expected = [place for place in case["selected"].tolist() if place >= 0]
    assert selection.order is not None
    assert selection.kept[1].nonzero()[:, 0][selection.order].tolist() == expected
    assert selection.asked - selection.kept_tokens == case["zero_rows"]


def outputs(selection: Selection, sources: torch.Tensor) -> torch.Tensor:
    """The features that enter the projector, in the order in which they do."""
    assert selection.mixing is not None
    assert selection.before_projector
    assert selection.order is not None
    return (selection.mixing.to_dense() @ sources)[selection.order]


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("number", CASES)
def test_prumerge_release(number: int, plus: bool) -> None:
    """The attention, the kept tokens in their order, and every merged feature."""
    case = Case("prumerge_plus" if plus else "prumerge", number)
    query, keys = case["cls_query"].view(1, 1, 1, -1), case["keys"][None, None]
    attention = joint_row(query, keys)
    assert torch.allclose(attention[0, 0], case["cls_attention"], rtol=1e-4, atol=1e-8)
    signals = {
        ("joint_attention", 23): attention,
        ("keys", 23): keys[:, :, 1:],
        ("projector_inputs", 22): case["features"][None],
    }
    one = image(1, signals)
    selection = (PruMergePlus if plus else PruMerge).release().reduce(one)
    assert selection.order is not None
    places = selection.kept[0].nonzero()[:, 0][selection.order]
    assert places[:-1].tolist() == case["kept"].tolist()
    assert torch.allclose(outputs(selection, case["features"]), case["tokens"], rtol=1e-3, atol=1e-3)


def on_tiles(case: Case, tiles: int) -> TileGeometry:
    """The recorded tile grid with all tokens in raster order, nothing unpadded, as the releases pack it."""
    rows, cols = case["grid"].tolist() if tiles > 1 else (0, 0)
    if tiles == 1:
        return TileGeometry.single((24, 24))
    size = (336 * rows, 336 * cols)
    return TileGeometry.anyres(size, (rows, cols), (24, 24), 336)


@pytest.mark.parametrize("number", CASES)
def test_visionzip_release(number: int) -> None:
    """Dominant tokens, targets, every feature, and for several tiles the order in which rows reach the LLM."""
    case = Case("visionzip", number)
    tiles = len(case["attention"])
    layout = on_tiles(case, tiles)
    signals = {
        ("cls_attention", 22): case["attention"],
        ("keys", 22): case["keys"][:, None, 1:],
        ("projector_inputs", 22): case["features"][:, 1:],
        ("cls_features", 22): case["features"][:, :1],
    }
    one = EncodedImage(layout, torch.zeros(tiles, TOKENS, 1), signals, layers=24, feature_layer=22)
    selection = VisionZip.release(case["dominant"], case["contextual"]).reduce(one)
    sources = torch.cat([case["features"][:, 1:].flatten(0, 1), case["features"][:, 0]])
    rows = [(0, row) for row in range(case["tokens"].shape[1])] if tiles == 1 else case["packed"].tolist()
    expected = torch.stack([case["tokens"][view, row] for view, row in rows])
    assert torch.allclose(outputs(selection, sources), expected, rtol=1e-3, atol=1e-3)
    assert selection.kept_per_tile == [case["dominant"] + case["contextual"]] * tiles
    for tile in range(tiles):
        assert bool(selection.kept[tile, case["dominant_index"][tile].long()].all())
        assert bool(selection.kept[tile, case["context_target"][tile].long()].all())


@pytest.mark.parametrize("number", CASES)
def test_trim_release(number: int) -> None:
    """The count, the kept tokens and the merged one of every view; views of a case are images of one batch."""
    case = Case("trim", number)
    views = len(case["features"])
    share = None if case["k"] < 0 else case["k"]
    signals = {
        ("aligned_features", 22): case["projected"],
        ("question", 22): case["text_embeds"][:1],
        ("projector_inputs", 22): case["features"],
    }
    if views > 1:  # each view has its own text: give its product with the tokens, along one axis
        products = torch.einsum("vnd,vd->vn", case["projected"], case["text_embeds"])[..., None]
        signals |= {("aligned_features", 22): products, ("question", 22): torch.ones(1, 1)}
    selection = TRIM.release(share, text_model="unused").reduce(image(views, signals))
    assert selection.kept_per_tile == [case["tokens_count"]] * views
    found = outputs(selection, case["features"].flatten(0, 1)).view(views, case["tokens_count"], -1)
    for tile, kept in enumerate(case["kept"]):
        assert torch.allclose(found[tile, :-1], case["features"][tile][kept], rtol=1e-3, atol=1e-3)
        assert torch.allclose(found[tile, -1], case["merged"][tile], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", CASES)
def test_cdpruner_release(number: int) -> None:
    """The relevance, the kept tokens, and the order of picking."""
    case = Case("cdpruner", number)
    tiles = len(case["features"])
    signals = {("aligned_features", 22): case["image_embeds"], ("question", 22): case["text_embeds"]}
    one = replace(image(tiles, signals), features=case["features"])
    reducer = CDPruner.release(Budget(case["budget"], per="tile"), text_model="unused")
    relevance = reducer.selection.score(one)
    assert torch.allclose(relevance, case["relevance"], rtol=1e-3, atol=1e-3)
    assert torch.equal(reducer.reduce(one).kept, case["kept"])
    for tile, picks in enumerate(case["pick_order"]):
        assert greedy_dpp(case["features"][tile], relevance[tile], len(picks)).tolist() == picks.tolist()


def eadp_case(number: int) -> tuple[Case, EncodedImage, EADP]:
    """A recorded case of EADP, its image and the release with the options of the case."""
    case = Case("eadp", number)
    signals = {
        ("aligned_features", 22): case["image_embeds"],
        ("question", 22): case["text_embeds"],
        ("question_positions", 22): case["text_positions"],
    }
    one = replace(image(len(case["features"]), signals), features=case["features"])
    return case, one, EADP.release(Budget(case["budget"], per="tile"), text_model="unused")


@pytest.mark.parametrize("number", CASES)
def test_eadp_release(number: int) -> None:
    """The importance up to its scale, the tokens per tile, the kept tokens, and the order of picking."""
    case, one, reducer = eadp_case(number)
    importance = reducer.selection.score(one)
    assert torch.allclose(importance, case["importance"], rtol=1e-3, atol=1e-5)
    selection = reducer.reduce(one)
    assert selection.granted_per_tile == case["counts"].tolist()
    assert torch.equal(selection.kept, case["kept"])
    for tile, picks in enumerate(case["selected"].tolist()):
        expected = [place for place in picks if place >= 0]
        assert facility_location(case["features"][tile], importance[tile], len(expected)).tolist() == expected


EARLY, LATE = [6, 9, 12], [20, 21, 22]


def hero_case(number: int) -> tuple[Case, EncodedImage, HERO]:
    """A recorded case of HERO, its image and the release with the options of the case."""
    case = Case("hero", number)
    (height, width), (rows, cols) = case["image_size"].tolist(), case["grid"].tolist()
    layout = TileGeometry.anyres((height, width), (rows, cols), (24, 24), 336)
    early = F.pad(case["early_attention"], (0, 0, 0, 0, 1, 0))  # [layers, tiles, heads, tokens]: none of the base tile
    late = F.pad(case["late_attention"][:, None], (0, 0, 0, 0, 0, layout.sub_images))  # none of the others
    maps = [*zip(EARLY, early, strict=True), *zip(LATE, late, strict=True)]
    signals = {
        **{("cls_attention", layer): attention for layer, attention in maps},
        ("cls_features", 23): case["cls"][:, None],
        ("aligned_cls", 23): case["aligned_cls"][:, None],
        ("question", 22): case["text_embeds"],
    }
    one = EncodedImage(layout, torch.zeros(layout.tiles, TOKENS, 1), signals, layers=24, feature_layer=22)
    temperatures = (case["cls_temperature"], case["clip_temperature"])
    return case, one, HERO.release(case["retention"], case["alpha"], *temperatures, EARLY, LATE, text_model="unused")


@pytest.mark.parametrize("number", CASES)
def test_hero_release(number: int) -> None:
    """The tokens per tile, the kept tokens and the sequence; the release has newlines in rows of padding too."""
    case, one, reducer = hero_case(number)
    selection = reducer.reduce(one)
    assert selection.granted_per_tile == case["kept"].sum(dim=1).tolist()
    assert torch.equal(selection.kept, case["kept"])
    tile, token = case["packed"].long().T
    packed = torch.where(tile < 0, -1, tile * TOKENS + token)
    found = one.geometry.packed[selection.packed_mask()]
    assert found[found >= 0].tolist() == packed[packed >= 0].tolist()
    if one.geometry.newlines == 24 * one.geometry.tile_grid[0]:
        assert found.tolist() == packed.tolist()


def test_each_part_of_these_releases_matters() -> None:
    """Otherwise the recorded cases would be equal whatever the presets say."""
    case, one, reducer = eadp_case(1)
    relevance = reducer.selection.relevance  # type: ignore[attr-defined]
    for change in ({"words": 0.5}, {"sharpness": 0.1}, {"whole": 0.0}, {"sigma": 0.1}, {"power": 2.0}):
        other = replace(reducer, selection=FacilityLocationSelection(replace(relevance, **change)))
        assert not torch.equal(other.reduce(one).kept, case["kept"]), change
    assert not torch.equal(replace(reducer, allocation=ScoreMassAllocation()).reduce(one).kept, case["kept"])
    case, one, hero = hero_case(1)
    for change in ({"retention": None}, {"saliency": 0.4}, {"density": 0.3}):
        allocation = replace(hero.allocation, **change)
        assert not torch.equal(replace(hero, allocation=allocation).reduce(one).kept, case["kept"]), change
    swapped = EarlyLateAttentionSelection(LATE, EARLY)
    assert not torch.equal(replace(hero, selection=swapped).reduce(one).kept, case["kept"])


def test_eadp_release_rounds_down_but_not_to_nothing() -> None:
    one = random_encoded_image(TileGeometry.anyres((56, 168), (1, 3), (4, 4), 56))
    mass = torch.tensor([6.0, 3.0, 0.98, 0.02])[:, None].expand(4, 16) / 16
    granted = ScoreMassAllocation(rounding="floor").allocate(one, 10, [16] * 4, mass)
    assert granted == [5, 2, 1, 1]  # 6 and 3 become a little less by the 1e-6 in the divisor
    assert ScoreMassAllocation(rounding="floor").allocate(one, 60, [16] * 4, mass) == [16, 16, 5, 1]
    assert ScoreMassAllocation(rounding="floor").allocate(one, 0, [16] * 4, mass) == [0] * 4


def test_prumerge_plus_merges_even_where_it_keeps_almost_all() -> None:
    """A quarter of outliers makes a step of one: every token but the last stays, and the last one holds the rest."""
    attention = torch.full((1, 1, TOKENS), 1e-4) * torch.linspace(1, 1.01, TOKENS)
    attention[..., 100:240] = 0.005
    signals = {
        ("joint_attention", 23): attention,
        ("keys", 23): torch.randn(1, 1, TOKENS, 4, generator=torch.Generator().manual_seed(0)),
        ("projector_inputs", 22): torch.zeros(1, TOKENS, 1),
    }
    selection = PruMergePlus.release().reduce(image(1, signals))
    assert selection.kept_tokens == TOKENS
    weights = selection.mixing.to_dense()  # type: ignore[union-attr]
    assert bool((weights[:-1].diagonal() == 1).all())
    assert weights[-1].nonzero()[:, 0].tolist() == [TOKENS - 1]
    assert float(weights[-1, -1]) == pytest.approx(float(attention[0, 0, -1]))


RECORDED = {
    "HiRED": "hired_release_masks",
    "FasterVLM": "fastervlm",
    "GlobalCom2": "globalcom2",
    "HiPrune": "hiprune",
    "HoloV": "holov",
    "SCOPE": "scope",
    "VisPruner": "vispruner",
    "DivPrune": "divprune",
    "TRIM": "trim",
    "CDPruner": "cdpruner",
    "EADP": "eadp",
    "HERO": "hero",
    "VisionZip": "visionzip",
    "PruMerge": "prumerge",
    "PruMergePlus": "prumerge_plus",
}


TRANSCRIBED = {"HERO"}
"""Recorded from a transcription of the official functions, not from the files themselves."""


def test_parity_is_what_is_tested() -> None:
    """Every strategy that claims recorded cases claims as many as are tested, and no other one claims any."""
    for name, kind in strategies().items():
        if name not in RECORDED:
            assert not kind.parity
            continue
        arrays = np.load(Path(__file__).parents[1] / "golden" / f"{RECORDED[name]}.npz")
        count = len({key.partition("/")[0] for key in arrays})
        source = "transcribed" if name in TRANSCRIBED else "official"
        assert kind.parity.endswith(f": {count}/{count} {source} cases")
        assert count == (12 if name == "HiRED" else len(CASES))


def test_divprune_pools_all_tiles() -> None:
    case = Case("divprune", 0)
    geometry = TileGeometry.single((24, 24))
    one = EncodedImage(geometry, case["features"][None], layers=24, feature_layer=22)
    expected = max_min_diverse(case["features"], 56)
    assert DivPrune(56).reduce(one).kept[0].nonzero()[:, 0].tolist() == sorted(expected.tolist())
    tiled = TileGeometry((1, 3), (12, 12), torch.zeros(3, 4), torch.arange(576))
    two = EncodedImage(tiled, case["features"].view(4, 144, -1), layers=24, feature_layer=22)
    assert DivPrune(56).reduce(two).kept.flatten().nonzero()[:, 0].tolist() == sorted(expected.tolist())


@pytest.mark.parametrize("budget", [66, 50, 30, 62, 10])
def test_vispruner_works_where_the_release_fails(budget: int) -> None:
    """At these budgets an odd number of tokens is left for de-duplication."""
    case = Case("vispruner", 0)
    signals = {("cls_attention", 22): case["attention"], ("vision_features", 22): case["features"]}
    one = image(len(case["attention"]), signals)
    assert VisPruner(Budget(budget, per="tile")).reduce(one).kept_per_tile == [budget] * one.geometry.tiles


# --- every shipped strategy keeps the promises of the library ---------------------------------------------------------

STRATEGIES = sorted(strategies())


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(10, 300), st.integers(10, 300)),
    grid=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    budget=st.one_of(st.integers(0, 200), st.floats(0, 1)),
    newlines=st.sampled_from(["keep_rows", "drop", "keep"]),
    seed=st.integers(0, 50),
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_budget_is_spent_exactly(name, size, grid, budget, newlines, seed) -> None:
    layout = TileGeometry.single((4, 4)) if not all(grid) else TileGeometry.anyres(size, grid, (4, 4), 56)
    reducer: Any = strategies()[name]
    selection = reducer(budget, newlines=newlines).reduce(random_encoded_image(layout, seed))
    expected = min(selection.asked, int(layout.valid.sum()))
    assert selection.kept_tokens == expected if reducer.exact else selection.kept_tokens <= expected
    assert selection.granted_per_tile == selection.kept_per_tile
    if selection.mixing is not None:
        weights = selection.mixing.to_dense()
        assert torch.allclose(weights.sum(dim=1), torch.ones(len(weights)), atol=1e-5)  # repaired merging takes means
        assert bool((weights >= 0).all())


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", STRATEGIES)
def test_images_without_any_difference_are_no_trouble(name: str, value: float) -> None:
    """Constant attention and features: ties everywhere, and vectors without direction."""
    layout = TileGeometry.anyres((60, 160), (1, 3), (4, 4), 56)
    one = random_encoded_image(layout)
    flat = {key: torch.full_like(signal, value) for key, signal in one.signals.items()}
    constant = EncodedImage(layout, torch.full_like(one.features, value), flat, one.layers, one.feature_layer)
    reducer: Any = strategies()[name]
    selection = reducer(17).reduce(constant)
    assert selection.kept_tokens == 17 if reducer.exact else selection.kept_tokens <= 17
    assert torch.equal(selection.kept, reducer(17).reduce(constant).kept)
