"""Compare strategies inside the LLM with outputs recorded from their official implementations."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.helpers.published import CASES, Case
from tokenprune.decoder.placement import Entries
from tokenprune.decoder.trace import LayerTrace, compute_attention
from tokenprune.decoder_reducer import DecoderReducer, ScheduledReducer
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.strategies import DART, FastV, PyramidDrop, SparseVLM

LAYERS, BEFORE = 32, 1


def make_image(tokens: int, signals: dict[tuple[str, int], Tensor], features: Tensor | None = None) -> EncodedImage:
    """Make an image of one row of tokens at a cut at layer 2 of 32."""
    states = torch.zeros(tokens, 1) if features is None else features
    geometry = TileGeometry.single((1, tokens))
    return EncodedImage(geometry, states[None], signals, layers=LAYERS, feature_layer=BEFORE)


def require_schedule(reducer: ScheduledReducer, case: Case) -> DecoderReducer:
    """Return the strategy at the recorded cut."""
    return next(reducer.at_cut(cut) for cut in reducer.cuts if cut.layer == case["layer"])


def kept_in_image(case: Case) -> Tensor:
    """Return the recorded mask of the visual tokens, `[1, tokens]`, from positions of the shortened sequence."""
    mask = torch.zeros(1, case["image_length"], dtype=torch.bool)
    index = case["kept"].long() - case["image_start"]
    mask[0, index[(index >= 0) & (index < case["image_length"])]] = True
    return mask


def list_entries(case: Case, kept: Tensor, length: int) -> Entries:
    """Return the entries of a sequence behind the cut; text always remains.

    Args:
        case: the recorded case.
        kept: the kept visual tokens, bool `[1, tokens]`.
        length: length of the sequence before the cut.
    """
    start, stop = case["image_start"], case["image_start"] + case["image_length"]
    remains = torch.ones(1, length, dtype=torch.bool)
    remains[:, start:stop] = kept[:, : case["image_length"]]
    return Entries.from_mask(remains, torch.ones_like(remains), int(remains.sum()), has_fillers=False)


@pytest.mark.parametrize("number", CASES)
def test_fastv_release(number: int) -> None:
    """The kept tokens are equal, and positions are those of the prompt."""
    case = Case("fastv", number)
    start, length = case["image_start"], case["image_length"]
    attention = case["attention"][None, :, start : start + length]
    reducer = FastV.release(case["keep_count"])
    selection = reducer.reduce(make_image(length, {("last_text_attention", BEFORE): attention}))
    assert torch.equal(selection.kept, kept_in_image(case))
    entries = list_entries(case, selection.kept, case["attention"].shape[-1])
    assert torch.equal(entries.index[0], case["kept"].long())
    assert reducer.positions == "preserve"
    positions = entries.take_ids(torch.arange(case["attention"].shape[-1])[None])[0]
    assert torch.equal(positions, case["position_ids"].long())


@pytest.mark.parametrize("number", CASES)
def test_pyramiddrop_release(number: int) -> None:
    """The kept tokens are equal; ratios refer to the tokens that entered; positions are counted anew."""
    case = Case("pyramiddrop", number)
    entered, length = case["original_length"], case["image_length"]
    attention = torch.zeros(1, 1, entered)
    attention[0, 0, :length] = case["attention"]
    image = make_image(entered, {("asked_last_attention", BEFORE): attention})
    image = EncodedImage(
        image.geometry.restrict(torch.arange(entered) < length),
        image.features,
        image.signals,
        layers=LAYERS,
        feature_layer=BEFORE,
    )
    reducer = PyramidDrop.release(case["ratios"][1:].tolist())
    kept = reducer.at_cut(reducer.cuts[case["stage"]]).reduce(image).kept
    assert torch.equal(kept[:, :length], kept_in_image(case))
    assert not kept[:, length:].any()
    assert reducer.positions == "reindex"
    entries = list_entries(case, kept, len(case["keys"]))
    assert torch.equal(entries.index[0], case["kept"].long())
    assert torch.equal(torch.arange(entries.width), case["position_ids"].long())


@pytest.mark.parametrize("number", CASES)
def test_asked_attention_equals_the_release_of_pyramiddrop(number: int) -> None:
    """The attention of the last token, from queries and keys before position embeddings, is the recorded one."""
    case = Case("pyramiddrop", number)
    query, keys = case["query"], case["keys"]
    length, heads, head_dim = keys.shape
    config = LlamaConfig(hidden_size=heads * head_dim, num_attention_heads=heads, head_dim=head_dim)
    cosines, sines = LlamaRotaryEmbedding(config)(keys, torch.arange(length)[None])
    key = keys.transpose(0, 1)[None]
    _, rotated = apply_rotary_pos_emb(key, key, cosines, sines)
    last, _ = apply_rotary_pos_emb(query[None, :, None], query[None, :, None], cosines[:, -1:], sines[:, -1:])
    trace = LayerTrace(query=last, key=rotated, scaling=head_dim**-0.5, past=length - 1)
    attention = compute_attention(trace, torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
    start = case["image_start"]
    image = attention[0, :, 0, start : start + case["image_length"]].mean(dim=0)
    torch.testing.assert_close(image, case["attention"].float(), rtol=1e-4, atol=1e-6)


def make_sparsevlm_image(case: Case, version: Literal[1, 2]) -> EncodedImage:
    start, length = case["image_start"], case["image_length"]
    signals = {
        ("text_attention", BEFORE): (case["attention"] * case["attention_scale"])[None],
        ("llm_hidden", 0): case["hidden"][None, start : start + length],
        ("text_hidden", 0): case["hidden"][start + length :],
    }
    if version == 1:
        return make_image(length, signals, case["layer_output"])
    positions, dim = case["position_ids"].double(), case["head_dim"]
    frequencies = case["rope_base"] ** (-torch.arange(0, dim, 2).double() / dim)
    offsets = positions[start + length :, None] - positions[None, start : start + length]
    similarity = 2 * (offsets[..., None] * frequencies).cos().sum(dim=-1) / dim**0.5
    return make_image(length, signals | {("rotary_similarity", BEFORE): similarity.float()[None, None]})


@pytest.mark.parametrize("number", CASES)
@pytest.mark.parametrize("version", [1, 2])
def test_sparsevlm_release(number: int, version: Literal[1, 2]) -> None:
    """Raters, relevance and kept tokens are equal; of version 1 also the merged tokens where they are deterministic."""
    case = Case(f"sparsevlm_v{version}", number)
    image = make_sparsevlm_image(case, version)
    reducer = require_schedule(SparseVLM.release(case["preset"], version), case)
    assert isinstance(reducer, SparseVLM)
    assert torch.equal(reducer.find_raters(image).nonzero()[:, 0], case["raters"].long())
    assert torch.allclose(reducer.score(image)[0], case["relevance"], rtol=1e-3, atol=1e-6)
    selection = reducer.reduce(image)
    if version == 2:
        assert torch.equal(selection.kept[0], case["kept"])
        return
    assert selection.mixing is not None
    is_merged = ~case["kept"][selection.kept[0]]
    assert torch.equal(selection.kept[0] & case["kept"], case["kept"])
    assert set(selection.mixing[is_merged].nonzero()[:, 1].tolist()) == set(case["recycled"].tolist())
    if case["merge_deterministic"]:
        merged = selection.mixing[is_merged] @ image.features[0]
        distances = (merged[:, None] - case["merged"][None]).abs().amax(dim=2)
        nearest = distances.argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(len(case["merged"])))
        assert torch.allclose(merged, case["merged"][nearest], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", CASES)
def test_dart_release(number: int) -> None:
    case = Case("dart", number)
    start, length = case["image_start"], case["image_length"]
    pivots = case["pivot_image"] + case["pivot_text"]
    keys, hidden = case["keys"], case["hidden"]
    image = make_image(
        length,
        {
            ("llm_keys", BEFORE): keys[None, :, start : start + length],
            ("text_keys", BEFORE): keys[:, start + length :],
            ("normed_hidden", BEFORE): hidden[None, start : start + length],
            ("normed_text_hidden", BEFORE): hidden[start + length :],
        },
    )
    reducer = DART.release(case["topk"] * pivots, case["pivot_image"], case["pivot_text"], start)
    assert torch.equal(reducer.reduce(image).kept, kept_in_image(case))
