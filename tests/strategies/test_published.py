"""Compare published methods with outputs recorded from their official implementations.

The recorded arrays cover images of several tiles of 24 x 24 tokens. Releases select from all tokens, including
padding, so the layouts of these tests have no padding. The docstring of each test names the compared values.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.published import CASES, Case
from tokenprune.budget import Budget
from tokenprune.catalog import strategies
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage
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


def make_image(tiles: int, signals: dict[tuple[str, int], torch.Tensor]) -> EncodedImage:
    """Make an image of a 24-layer tower in which every token is valid and the sub-images form one row."""
    geometry = TileGeometry(
        (1, tiles - 1) if tiles > 1 else (0, 0), (24, 24), torch.zeros(tiles - 1, 4), torch.arange(tiles * TOKENS)
    )
    return EncodedImage(geometry, torch.zeros(tiles, TOKENS, 1), signals, layers=24, feature_layer=22)


@pytest.mark.parametrize("number", CASES)
def test_fastervlm_release(number: int) -> None:
    case = Case("fastervlm", number)
    image = make_image(len(case["attention"]), {("cls_attention", 22): case["attention"]})
    kept = FasterVLM.release(Budget(case["budget"], per="tile")).reduce(image).kept
    assert torch.equal(kept, case["kept"])


@pytest.mark.parametrize("number", CASES)
def test_hiprune_release(number: int) -> None:
    case = Case("hiprune", number)
    signals = {
        ("received_attention", 8): case["object_attention"][:, None],
        ("received_attention", 22): case["deep_attention"][:, None],
    }
    image = make_image(len(case["kept"]), signals)
    assert torch.equal(HiPrune.release(case["total_budget"], case["alpha"]).reduce(image).kept, case["kept"])


@pytest.mark.parametrize("number", CASES)
def test_scope_release(number: int) -> None:
    """The kept tokens and the order of selection in every tile are equal."""
    case = Case("scope", number)
    signals = {("cls_attention", 22): case["attention"], ("vision_features", 22): case["features"]}
    image = make_image(len(case["attention"]), signals)
    assert torch.equal(SCOPE.release(case["total_budget"], case["alpha"]).reduce(image).kept, case["kept"])
    for tile, picks in enumerate(case["selected"]):
        saliency = case["attention"][tile].sum(0) ** case["alpha"]
        assert saliency_coverage(case["features"][tile], saliency, len(picks)).tolist() == picks.tolist()


@pytest.mark.parametrize("number", CASES)
def test_vispruner_release(number: int) -> None:
    """The kept tokens are equal, and the important tokens have the same order."""
    case = Case("vispruner", number)
    signals = {("cls_attention", 22): case["attention"], ("vision_features", 22): case["features"]}
    image = make_image(len(case["attention"]), signals)
    reducer = VisPruner.release(Budget(case["budget"], per="tile"), case["important_ratio"])
    assert torch.equal(reducer.reduce(image).kept, case["kept"])
    for tile, important in enumerate(case["important"]):
        order = important_then_diverse(
            case["features"][tile], case["attention"][tile].mean(0), case["budget"], len(important)
        )
        assert order[: len(important)].tolist() == important.tolist()


@pytest.mark.parametrize("number", CASES)
def test_divprune_release(number: int) -> None:
    """The kept tokens, the number of kept newline tokens and the order of selection are equal.

    All recorded newline rows are the same vector, so they are interchangeable.
    """
    case = Case("divprune", number)
    features = case["features"]
    kept_count = round(case["ratio"] * len(features))
    first_equal = (features[:, None] == features[None]).all(-1).int().argmax(dim=1)  # index of the first equal row
    picks = max_min_diverse(features, kept_count)
    assert first_equal[picks].tolist() == first_equal[case["selected"].long()].tolist()
    is_newline = first_equal != torch.arange(len(features))
    is_newline |= torch.isin(torch.arange(len(features)), first_equal[is_newline])
    assert int(is_newline.sum()) == (len(features) // 30 if len(features) in (900, 1000) else 0)
    packed = torch.where(is_newline, -1, torch.cumsum(~is_newline, dim=0) - 1)
    tokens = features[~is_newline]
    layout = TileGeometry((0, 0), (1, len(tokens)), torch.zeros(0, 4), packed)
    image = EncodedImage(layout, tokens[None], newline=features[is_newline][0] if bool(is_newline.any()) else None)
    selection = DivPrune.release(case["ratio"]).reduce(image)
    expected = case["kept"].long()
    assert selection.asked == kept_count == selection.kept_tokens + selection.kept_newlines
    assert selection.kept_newlines == int(is_newline[expected].sum())
    assert packed[selection.packed_mask() & ~is_newline].tolist() == packed[expected][packed[expected] >= 0].tolist()


@pytest.mark.parametrize("number", CASES)
def test_globalcom2_release(number: int) -> None:
    """The kept tokens on the true layout are equal; the release moves tokens when it unpads."""
    case = Case("globalcom2", number)
    height, width = case["image_size"].tolist()
    rows, cols = case["grid"].tolist()
    layout = TileGeometry.anyres((height, width), (rows, cols), (24, 24), 336)
    signals = {("cls_logits", 23): case["cls_logits"][:, None]}
    image = EncodedImage(layout, torch.zeros(layout.tiles, TOKENS, 1), signals, layers=24, feature_layer=22)
    selection = GlobalCom2.release(case["retention"]).reduce(image)
    assert selection.granted_per_tile == case["counts"].tolist()
    assert torch.equal(selection.kept, case["kept"])
    assert selection.order is not None
    base = selection.kept[0].nonzero()[:, 0]
    assert base[selection.order[: len(base)]].tolist() == case["thumbnail_order"].tolist()


@pytest.mark.parametrize("number", CASES)
def test_holov_release(number: int) -> None:
    """The kept tokens are equal, without the positions that the release fills with zero vectors."""
    case = Case("holov", number)
    length = len(case["attention"])
    geometry = TileGeometry((1, 1), (1, length), torch.zeros(1, 4), torch.arange(length, 2 * length))  # one pool
    attention = torch.cat([torch.zeros(1, 1, length), case["attention"][None, None]])
    image = EncodedImage(geometry, torch.zeros(2, length, 1), {("cls_attention", 22): attention}, 24, 22)
    selection = HoloV.release(case["budget"], case["stripes"]).reduce(image)
    expected = [token for token in case["selected"].tolist() if token >= 0]
    assert selection.order is not None
    assert selection.kept[1].nonzero()[:, 0][selection.order].tolist() == expected
    assert selection.asked - selection.kept_tokens == case["zero_rows"]


def compute_outputs(selection: Selection, sources: torch.Tensor) -> torch.Tensor:
    """Return the features that enter the projector, in their output order."""
    assert selection.mixing is not None
    assert selection.before_projector
    assert selection.order is not None
    return (selection.mixing.to_dense() @ sources)[selection.order]


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("number", CASES)
def test_prumerge_release(number: int, plus: bool) -> None:
    """The attention, the kept tokens in their order, and every merged feature are equal."""
    case = Case("prumerge_plus" if plus else "prumerge", number)
    query, keys = case["cls_query"].view(1, 1, 1, -1), case["keys"][None, None]
    attention = joint_row(query, keys)
    assert torch.allclose(attention[0, 0], case["cls_attention"], rtol=1e-4, atol=1e-8)
    signals = {
        ("joint_attention", 23): attention,
        ("keys", 23): keys[:, :, 1:],
        ("projector_inputs", 22): case["features"][None],
    }
    image = make_image(1, signals)
    selection = (PruMergePlus if plus else PruMerge).release().reduce(image)
    assert selection.order is not None
    kept_indices = selection.kept[0].nonzero()[:, 0][selection.order]
    assert kept_indices[:-1].tolist() == case["kept"].tolist()
    assert torch.allclose(compute_outputs(selection, case["features"]), case["tokens"], rtol=1e-3, atol=1e-3)


def make_tiled_layout(case: Case, tiles: int) -> TileGeometry:
    """Make a layout of the recorded tile grid without unpadding, as the releases pack it."""
    rows, cols = case["grid"].tolist() if tiles > 1 else (0, 0)
    if tiles == 1:
        return TileGeometry.single((24, 24))
    size = (336 * rows, 336 * cols)
    return TileGeometry.anyres(size, (rows, cols), (24, 24), 336)


@pytest.mark.parametrize("number", CASES)
def test_visionzip_release(number: int) -> None:
    """Dominant tokens, targets and features are equal, and for several tiles also the order of rows in the LLM."""
    case = Case("visionzip", number)
    tiles = len(case["attention"])
    layout = make_tiled_layout(case, tiles)
    signals = {
        ("cls_attention", 22): case["attention"],
        ("keys", 22): case["keys"][:, None, 1:],
        ("projector_inputs", 22): case["features"][:, 1:],
        ("cls_features", 22): case["features"][:, :1],
    }
    image = EncodedImage(layout, torch.zeros(tiles, TOKENS, 1), signals, layers=24, feature_layer=22)
    selection = VisionZip.release(case["dominant"], case["contextual"]).reduce(image)
    sources = torch.cat([case["features"][:, 1:].flatten(0, 1), case["features"][:, 0]])
    rows = [(0, row) for row in range(case["tokens"].shape[1])] if tiles == 1 else case["packed"].tolist()
    expected = torch.stack([case["tokens"][view, row] for view, row in rows])
    assert torch.allclose(compute_outputs(selection, sources), expected, rtol=1e-3, atol=1e-3)
    assert selection.kept_per_tile == [case["dominant"] + case["contextual"]] * tiles
    for tile in range(tiles):
        assert bool(selection.kept[tile, case["dominant_index"][tile].long()].all())
        assert bool(selection.kept[tile, case["context_target"][tile].long()].all())


@pytest.mark.parametrize("number", CASES)
def test_trim_release(number: int) -> None:
    """The count, the kept tokens and the merged token of every view are equal; views are images of one batch."""
    case = Case("trim", number)
    views = len(case["features"])
    keep_ratio = None if case["k"] < 0 else case["k"]
    signals = {
        ("aligned_features", 22): case["projected"],
        ("question", 22): case["text_embeds"][:1],
        ("projector_inputs", 22): case["features"],
    }
    if views > 1:  # each view has its own text: pass its product with the tokens as a signal of one dimension
        products = torch.einsum("vnd,vd->vn", case["projected"], case["text_embeds"])[..., None]
        signals |= {("aligned_features", 22): products, ("question", 22): torch.ones(1, 1)}
    selection = TRIM.release(keep_ratio, text_model="unused").reduce(make_image(views, signals))
    assert selection.kept_per_tile == [case["tokens_count"]] * views
    features = compute_outputs(selection, case["features"].flatten(0, 1)).view(views, case["tokens_count"], -1)
    for tile, kept in enumerate(case["kept"]):
        assert torch.allclose(features[tile, :-1], case["features"][tile][kept], rtol=1e-3, atol=1e-3)
        assert torch.allclose(features[tile, -1], case["merged"][tile], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", CASES)
def test_cdpruner_release(number: int) -> None:
    """The relevance, the kept tokens and the order of selection are equal."""
    case = Case("cdpruner", number)
    tiles = len(case["features"])
    signals = {("aligned_features", 22): case["image_embeds"], ("question", 22): case["text_embeds"]}
    image = replace(make_image(tiles, signals), features=case["features"])
    reducer = CDPruner.release(Budget(case["budget"], per="tile"), text_model="unused")
    relevance = reducer.selection.score(image)
    assert torch.allclose(relevance, case["relevance"], rtol=1e-3, atol=1e-3)
    assert torch.equal(reducer.reduce(image).kept, case["kept"])
    for tile, picks in enumerate(case["pick_order"]):
        assert greedy_dpp(case["features"][tile], relevance[tile], len(picks)).tolist() == picks.tolist()


def load_eadp_case(number: int) -> tuple[Case, EncodedImage, EADP]:
    """Load a recorded case of EADP, its image, and the release preset with the options of the case."""
    case = Case("eadp", number)
    signals = {
        ("aligned_features", 22): case["image_embeds"],
        ("question", 22): case["text_embeds"],
        ("question_positions", 22): case["text_positions"],
    }
    image = replace(make_image(len(case["features"]), signals), features=case["features"])
    return case, image, EADP.release(Budget(case["budget"], per="tile"), text_model="unused")


@pytest.mark.parametrize("number", CASES)
def test_eadp_release(number: int) -> None:
    """The importance up to its scale, the tokens per tile, the kept tokens and the order of selection are equal."""
    case, image, reducer = load_eadp_case(number)
    importance = reducer.selection.score(image)
    assert torch.allclose(importance, case["importance"], rtol=1e-3, atol=1e-5)
    selection = reducer.reduce(image)
    assert selection.granted_per_tile == case["counts"].tolist()
    assert torch.equal(selection.kept, case["kept"])
    for tile, picks in enumerate(case["selected"].tolist()):
        expected = [token for token in picks if token >= 0]
        assert facility_location(case["features"][tile], importance[tile], len(expected)).tolist() == expected


EARLY_LAYERS, LATE_LAYERS = [6, 9, 12], [20, 21, 22]


def load_hero_case(number: int) -> tuple[Case, EncodedImage, HERO]:
    """Load a recorded case of HERO, its image, and the release preset with the options of the case."""
    case = Case("hero", number)
    (height, width), (rows, cols) = case["image_size"].tolist(), case["grid"].tolist()
    layout = TileGeometry.anyres((height, width), (rows, cols), (24, 24), 336)
    early = F.pad(case["early_attention"], (0, 0, 0, 0, 1, 0))  # [layers, tiles, heads, tokens]: zero in the base tile
    late = F.pad(case["late_attention"][:, None], (0, 0, 0, 0, 0, layout.sub_images))  # zero in the sub-images
    maps = [*zip(EARLY_LAYERS, early, strict=True), *zip(LATE_LAYERS, late, strict=True)]
    signals = {
        **{("cls_attention", layer): attention for layer, attention in maps},
        ("cls_features", 23): case["cls"][:, None],
        ("aligned_cls", 23): case["aligned_cls"][:, None],
        ("question", 22): case["text_embeds"],
    }
    image = EncodedImage(layout, torch.zeros(layout.tiles, TOKENS, 1), signals, layers=24, feature_layer=22)
    temperatures = (case["cls_temperature"], case["clip_temperature"])
    return (
        case,
        image,
        HERO.release(case["retention"], case["alpha"], *temperatures, EARLY_LAYERS, LATE_LAYERS, text_model="unused"),
    )


@pytest.mark.parametrize("number", CASES)
def test_hero_release(number: int) -> None:
    """The tokens per tile, the kept tokens and their sequence are equal; the release also has newlines in padding."""
    case, image, reducer = load_hero_case(number)
    selection = reducer.reduce(image)
    assert selection.granted_per_tile == case["kept"].sum(dim=1).tolist()
    assert torch.equal(selection.kept, case["kept"])
    tile, token = case["packed"].long().T
    packed = torch.where(tile < 0, -1, tile * TOKENS + token)
    packed_kept = image.geometry.packed[selection.packed_mask()]
    assert packed_kept[packed_kept >= 0].tolist() == packed[packed >= 0].tolist()
    if image.geometry.newlines == 24 * image.geometry.tile_grid[0]:
        assert packed_kept.tolist() == packed.tolist()


def test_each_option_of_these_releases_changes_the_mask() -> None:
    """A changed option gives another mask, so the recorded cases detect a change of the presets."""
    case, image, reducer = load_eadp_case(1)
    relevance = reducer.selection.relevance  # type: ignore[attr-defined]
    for change in (
        {"word_share": 0.5},
        {"weight_temperature": 0.1},
        {"global_weight": 0.0},
        {"sigma": 0.1},
        {"power": 2.0},
    ):
        variant = replace(reducer, selection=FacilityLocationSelection(replace(relevance, **change)))
        assert not torch.equal(variant.reduce(image).kept, case["kept"]), change
    assert not torch.equal(replace(reducer, allocation=ScoreMassAllocation()).reduce(image).kept, case["kept"])
    case, image, hero = load_hero_case(1)
    for change in ({"retention": None}, {"saliency": 0.4}, {"density": 0.3}):
        allocation = replace(hero.allocation, **change)
        assert not torch.equal(replace(hero, allocation=allocation).reduce(image).kept, case["kept"]), change
    swapped_selection = EarlyLateAttentionSelection(LATE_LAYERS, EARLY_LAYERS)
    assert not torch.equal(replace(hero, selection=swapped_selection).reduce(image).kept, case["kept"])


def test_eadp_release_rounds_down_to_at_least_one_token() -> None:
    image = random_encoded_image(TileGeometry.anyres((56, 168), (1, 3), (4, 4), 56))
    mass = torch.tensor([6.0, 3.0, 0.98, 0.02])[:, None].expand(4, 16) / 16

    def allocate(total: int) -> list[int]:
        return torch.as_tensor(ScoreMassAllocation(rounding="floor").allocate(image, total, [16] * 4, mass)).tolist()

    granted = allocate(10)
    assert granted == [5, 2, 1, 1]  # the 1e-6 in the divisor puts the quotas slightly below 6 and 3
    assert allocate(60) == [16, 16, 5, 1]
    assert allocate(0) == [0] * 4


def test_prumerge_plus_merges_if_it_keeps_every_token() -> None:
    """With a quarter of outliers the step is one: every row but the last is unchanged, and the last row is merged."""
    attention = torch.full((1, 1, TOKENS), 1e-4) * torch.linspace(1, 1.01, TOKENS)
    attention[..., 100:240] = 0.005
    signals = {
        ("joint_attention", 23): attention,
        ("keys", 23): torch.randn(1, 1, TOKENS, 4, generator=torch.Generator().manual_seed(0)),
        ("projector_inputs", 22): torch.zeros(1, TOKENS, 1),
    }
    selection = PruMergePlus.release().reduce(make_image(1, signals))
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
    "FastV": "fastv",
    "PyramidDrop": "pyramiddrop",
    "SparseVLM": "sparsevlm_v2",
    "DART": "dart",
    "ToMe": "tome",
    "PiToMe": "pitome",
    "IPCV": "ipcv",
    "PixelPrune": "pixelprune",
}
TRANSCRIBED = {"HERO"}
"""Methods recorded from a transcription of the official functions, not from the official files."""


def test_parity_claims_match_the_recorded_cases() -> None:
    """The parity text of a strategy has the number of recorded cases, and is empty without recorded cases."""
    for name, strategy in strategies().items():
        if name not in RECORDED:
            assert not strategy.parity
            continue
        arrays = np.load(Path(__file__).parents[1] / "golden" / f"{RECORDED[name]}.npz")
        count = len({key.partition("/")[0] for key in arrays})
        source = "transcribed" if name in TRANSCRIBED else "official"
        assert strategy.parity.endswith(f": {count}/{count} {source} cases")
        assert count == (12 if name == "HiRED" else len(CASES))


def test_divprune_pools_all_tiles() -> None:
    case = Case("divprune", 0)
    geometry = TileGeometry.single((24, 24))
    single_image = EncodedImage(geometry, case["features"][None], layers=24, feature_layer=22)
    expected = max_min_diverse(case["features"], 56)
    assert DivPrune(56).reduce(single_image).kept[0].nonzero()[:, 0].tolist() == sorted(expected.tolist())
    tiled_layout = TileGeometry((1, 3), (12, 12), torch.zeros(3, 4), torch.arange(576))
    tiled_image = EncodedImage(tiled_layout, case["features"].view(4, 144, -1), layers=24, feature_layer=22)
    assert DivPrune(56).reduce(tiled_image).kept.flatten().nonzero()[:, 0].tolist() == sorted(expected.tolist())


@pytest.mark.parametrize("budget", [66, 50, 30, 62, 10])
def test_vispruner_accepts_budgets_that_fail_in_the_release(budget: int) -> None:
    """At these budgets the number of tokens for de-duplication is odd."""
    case = Case("vispruner", 0)
    signals = {("cls_attention", 22): case["attention"], ("vision_features", 22): case["features"]}
    image = make_image(len(case["attention"]), signals)
    assert VisPruner(Budget(budget, per="tile")).reduce(image).kept_per_tile == [budget] * image.geometry.tiles
