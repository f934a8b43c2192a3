"""The run of a block has the account, the selections and the pixels of its calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.llava import BAND, ROWS, TALL, WIDE
from tests.helpers.oracle import generate
from tokenprune import Budget
from tokenprune.decoder_reducer import AtLayer
from tokenprune.image import LLM_SIGNALS
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import FEATHER, FastV, HiRED, PyramidDrop, TransPrune, UniformStride
from tokenprune.testing.tiny_models import batch, tiny_model


def test_the_account_equals_cache_bytes_and_counted_flops(family: str) -> None:
    """The account has the bytes of the real cache and the FLOPs that torch counts in the language model."""
    model, inputs = tiny_model(family, "eager"), batch(family, [WIDE])  # torch counts no FLOPs of CPU attention kernels
    with HiRED(0.2)(model) as run:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert run.account.kv_bytes == cache
    assert run.account.kv_bytes_full > cache
    (before, after), image = run.account.prompt_lengths[0], run.account.images[0]
    assert before - after == image.valid + image.newlines_full - image.kept - image.newlines
    assert run.account.tokens_per_layer == [after] * 2
    assert image.kept == image.asked == run.account.asked == Budget(0.2).asked(run.selections[0].geometry)
    features = torch.randn(1, after, 32)
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model.language_model(inputs_embeds=features, use_cache=False).last_hidden_state
        model.lm_head(hidden[:, -1:])
    assert run.account.flops == counter.get_total_flops()
    assert run.account.summary()["prompt_length"] == after
    assert "KV cache" in str(run.account)


@pytest.mark.parametrize(
    "reducer",
    [
        AtLayer(1, UniformStride(0.3)),
        HiRED(0.4) >> AtLayer(1, UniformStride(0.5)),
        FastV(layer=1, budget=0.4),
        PyramidDrop(schedule=((1, 0.4),)),
        HiRED(0.4) >> FEATHER(schedule=((1, 0.4),)),
        HiRED(0.4) >> TransPrune(schedule=((1, 0.4),)),
    ],
    ids=lambda reducer: reducer.label,
)
def test_the_account_of_a_cut_equals_cache_bytes_and_counted_flops(family: str, reducer: TokenReducer) -> None:
    """Layers after the cut store and compute the tokens that remain, as the account of each layer states."""
    model, inputs = tiny_model(family, "eager"), batch(family, [WIDE])
    with reducer(model) as run, FlopCounterMode(display=False) as counter:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    account, ((layer, cut),) = run.account, run.account.cuts.items()
    layers = out.past_key_values.layers
    assert account.tokens_per_layer == [stored.keys.shape[-2] for stored in layers]
    assert account.kv_bytes == sum(stored.keys.nbytes + stored.values.nbytes for stored in layers)
    counts = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    language_model = next(name for name in counts if name.endswith(".language_model"))
    head = next(name for name in counts if name.endswith(".lm_head"))
    assert account.flops + account.signal_flops == counts[language_model] + counts[head]
    assert (account.signal_flops > 0) == any(signal.kind in LLM_SIGNALS for signal in reducer.needs)
    entered, remained = account.tokens_per_layer
    (selection,) = run.cuts[0].selections
    dropped = selection.geometry.valid_tokens + selection.geometry.newlines - cut.kept - selection.kept_newlines
    assert (layer, entered - remained) == (1, dropped)
    assert cut.asked == cut.kept == selection.kept_tokens
    assert account.average_tokens == (account.kept + cut.kept) / 2
    assert f"from layer 1: {cut.asked} asked, {cut.kept} kept" in repr(run)


def test_an_overlay_without_images_raises(model: Any) -> None:
    with pytest.warns(UserWarning, match="nothing was reduced"), HiRED(0.2)(model) as run:
        pass
    with pytest.raises(ValueError, match="no image was reduced"):
        run.overlay()


def test_selections_cover_every_image(model: Any, family: str) -> None:
    with HiRED(0.2)(model) as run:
        model(**batch(family, *ROWS))
        generate(model, batch(family, [BAND], seed=5))
    assert len(run.selections) == len(run.account.images) == 5
    assert len(run.account.prompt_lengths) == 5
    assert all(s.pixels is not None and s.pixels.shape[0] == s.geometry.tiles for s in run.selections)


def test_only_the_first_eight_images_of_a_run_keep_pixels(model: Any, family: str) -> None:
    with HiRED(0.2)(model) as run:
        for _ in range(5):
            model(**batch(family, [WIDE], [TALL]))
    assert [s.pixels is not None for s in run.selections] == [True] * 8 + [False] * 2
    with pytest.raises(ValueError, match="pixels"):
        run.selections[-1].overlay()
