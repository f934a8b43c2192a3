"""Attention rows of a traced layer against the full map, written out for every kind of mask."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import collect_state
from tokenprune.adapter import find_adapter
from tokenprune.decoder import trace as trace_module
from tokenprune.decoder.trace import LayerTrace, compute_attention
from tokenprune.decoder.views import ImagePositions, SignalSource, build_views, read_signal
from tokenprune.geometry import TileGeometry
from tokenprune.image import ASKED_SIGNALS, LLM_SIGNALS, EncodedImage, MissingSignalError
from tokenprune.models._capture.decoder import measure_change

ROWS, HEADS, KV_HEADS, WIDTH, PAST, DIM = 3, 4, 2, 7, 3, 8


def build_trace(**options: Any) -> LayerTrace:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, HEADS, WIDTH, DIM, generator=generator)
    key = torch.randn(ROWS, KV_HEADS, PAST + WIDTH, DIM, generator=generator)
    return LayerTrace(query=query, key=key, scaling=0.5, past=PAST, **options)


def full_map(trace: LayerTrace, visible: Tensor) -> Tensor:
    """Return the attention map under a mask of visible keys, `[rows, heads, width, keys]`."""
    assert trace.query is not None
    assert trace.key is not None
    key = trace.key.repeat_interleave(HEADS // KV_HEADS, dim=1)
    logits = trace.query @ key.transpose(-1, -2) * trace.scaling
    return logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)


CAUSAL = torch.ones(WIDTH, PAST + WIDTH, dtype=torch.bool).tril(PAST)
PADDED = torch.arange(PAST + WIDTH) >= torch.tensor([[0], [1], [2]])
SPARSE = CAUSAL & (torch.rand(ROWS, 1, WIDTH, PAST + WIDTH, generator=torch.Generator().manual_seed(1)) < 0.7)
SPARSE = SPARSE | torch.eye(WIDTH, PAST + WIDTH, dtype=torch.bool).roll(PAST, dims=1)
CASES: dict[str, tuple[dict[str, Any], Tensor]] = {
    "no mask": ({}, CAUSAL.expand(ROWS, 1, -1, -1)),
    "no mask, both directions": ({"is_causal": False}, torch.ones_like(SPARSE)),
    "flash window": ({"window": 4}, (CAUSAL & ~CAUSAL.tril(PAST - 4)).expand(ROWS, 1, -1, -1)),
    "padding": ({"mask": PADDED.long()}, CAUSAL & PADDED[:, None, None]),
    "bool": ({"mask": SPARSE}, SPARSE),
    "bool, wider than the keys": ({"mask": torch.nn.functional.pad(SPARSE, (0, 5))}, SPARSE),
    "bool, shared by the rows": ({"mask": SPARSE[:1]}, SPARSE[:1].expand(ROWS, -1, -1, -1)),
    "float": ({"mask": torch.zeros(SPARSE.shape).masked_fill(~SPARSE, torch.finfo(torch.float32).min)}, SPARSE),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_attention_rows_equal_the_map(case: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "CHUNK_ELEMENTS", chunk)
    options, visible = CASES[case]
    trace = build_trace(**options)
    expected = full_map(trace, visible)
    rows, positions = torch.tensor([2, 0]), torch.tensor([[6, 2, 3], [4, 5, 6]])
    weights = compute_attention(trace, rows, positions)
    torch.testing.assert_close(weights, expected[rows[:, None], :, positions].transpose(1, 2), rtol=0, atol=1e-6)
    images = [
        ImagePositions(2, torch.tensor([2, 3]), torch.tensor([4, 6])),
        ImagePositions(0, torch.tensor([1, 4, 3]), torch.tensor([5])),
        ImagePositions(2, torch.tensor([5, 4]), torch.tensor([6])),
    ]
    last = torch.tensor([5, 6, 6])
    for number, image in enumerate(images):
        columns = expected[image.row][..., image.entries + PAST]
        for kind, value in {
            "last_text_attention": columns[:, last[image.row]],
            "text_attention": columns[:, image.text],
            "visual_attention": columns[:, image.entries].mean(dim=1),
        }.items():
            torch.testing.assert_close(read_signal(kind, trace, images, last)[number], value, rtol=0, atol=1e-6)


def test_the_attention_of_no_queries_is_empty() -> None:
    weights = compute_attention(build_trace(), torch.tensor([2, 0]), torch.zeros(2, 0, dtype=torch.long))
    assert weights.shape == (2, HEADS, 0, PAST + WIDTH)


def test_repeated_rows_are_skipped() -> None:
    trace = build_trace(mask=SPARSE)
    repeated = LayerTrace(
        query=trace.query.repeat_interleave(2, 0),  # type: ignore[union-attr]
        key=trace.key.repeat_interleave(2, 0),  # type: ignore[union-attr]
        mask=SPARSE.repeat_interleave(2, 0),
        scaling=0.5,
        past=PAST,
    ).take_rows(2)
    rows, positions = torch.arange(ROWS), torch.full((ROWS, 1), 5)
    assert torch.equal(compute_attention(trace, rows, positions), compute_attention(repeated, rows, positions))
    assert LayerTrace(mask=SPARSE[:1]).take_rows(2).mask is not None


def test_a_signal_that_was_not_traced_is_an_error() -> None:
    image = ImagePositions(0, torch.tensor([0]), torch.tensor([1]))
    for kind in LLM_SIGNALS:
        with pytest.raises(MissingSignalError, match="was not traced"):
            read_signal(kind, LayerTrace(), [image], torch.tensor([1]))


def test_transitions_cover_real_positions_only() -> None:
    torch.manual_seed(0)
    change = measure_change(torch.randn(1, 5, 4), torch.randn(1, 5, 4))
    image, last = ImagePositions(0, torch.tensor([2, 3]), torch.tensor([4])), torch.tensor([4])
    real = torch.tensor([[False, True, True, True, True]])
    padded = read_signal("token_transition", LayerTrace(transition=change[:, :, None]), [image], last, real)[0]
    moved = ImagePositions(0, image.entries - 1, image.text - 1)
    alone = read_signal("token_transition", LayerTrace(transition=change[:, 1:, None]), [moved], last - 1)[0]
    torch.testing.assert_close(padded, alone)


def test_views_keep_signals_of_the_tower() -> None:
    layout = TileGeometry.single((2, 2)).restrict(torch.tensor([True, False, True, True]))
    hidden = torch.arange(12.0).view(1, 6, 2)
    images = [ImagePositions(0, torch.tensor([1, 2, 4]), torch.tensor([5]))]
    source = SignalSource(LayerTrace(hidden=hidden), images, torch.tensor([5]))
    earlier = SignalSource(LayerTrace(hidden=hidden + 100), images, torch.tensor([5]))
    tower = EncodedImage(TileGeometry.single((2, 2)), torch.ones(1, 4, 3), {("keys", 1): torch.ones(1, 1, 4, 2)}, 2, 1)
    (view,) = build_views([layout], source, {("llm_hidden", 1): earlier, ("text_hidden", 0): earlier}, 4, 2, 1, [tower])
    expected = torch.stack([hidden[0, 1], torch.zeros(2), hidden[0, 2], hidden[0, 4]])[None]
    assert torch.equal(view.features, expected)
    assert torch.equal(view.llm_hidden("before"), expected + 100 * layout.valid[..., None])
    assert torch.equal(view.text_hidden(0), hidden[0, 5:] + 100)
    assert view.keys("feature").shape == (1, 1, 4, 2)
    assert view.geometry is layout
    assert view.depths["asked_keys"] == (4, 2)
    assert view.depths["llm_hidden"] == (4, 1)


@pytest.fixture(scope="module")
def model(inputs: Any) -> Any:
    model = FAMILIES["llava"].model()
    with torch.no_grad():
        model(**inputs)  # transformers installs its own capturing hooks at the first call
    return model


@pytest.fixture(scope="module")
def inputs() -> Any:
    return FAMILIES["llava"].batch([(112, 112)], [(60, 160)])


@torch.no_grad()
def ask(model: Any, inputs: Any, index: int, rotated: bool = True, **options: Any) -> LayerTrace:
    """Return the trace that a layer is asked for in its own pre-hook."""
    adapter: Any = find_adapter(model)
    traces: list[LayerTrace] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        traces.append(adapter.ask_layer(index, args, kwargs, rotated))

    handle = adapter.decoder_modules.layers[index].register_forward_pre_hook(hook, with_kwargs=True)
    model(**inputs, **options)
    handle.remove()
    return traces[0]


def test_unrotated_queries_and_keys_are_projections(model: Any, inputs: Any) -> None:
    layer = model.model.language_model.layers[1]
    trace = ask(model, inputs, 1, rotated=False)
    with torch.no_grad():
        normed = layer.input_layernorm(trace.hidden)
        query, key = (
            projection(normed).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
    assert torch.equal(trace.query, query)  # type: ignore[arg-type]
    assert torch.equal(trace.key, key)  # type: ignore[arg-type]
    rotated = ask(model, inputs, 1)
    assert not torch.allclose(rotated.key, key)  # type: ignore[arg-type]
    torch.testing.assert_close(rotated.key.norm(dim=-1), key.norm(dim=-1), rtol=0, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
@torch.no_grad()
def test_a_later_turn_reads_the_keys_in_the_cache(model: Any, inputs: Any, cache_implementation: str) -> None:
    from transformers import DynamicCache, StaticCache

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first, later = ids.shape[1], torch.tensor([[5, 6, 7], [8, 9, 10]])
    longer = {"input_ids": torch.cat([ids, later], 1), "attention_mask": torch.nn.functional.pad(mask, (0, 3), value=1)}
    complete = ask(model, {**inputs, **longer}, 1)
    config = model.config.get_text_config()
    cache = DynamicCache() if cache_implementation == "dynamic" else StaticCache(config=config, max_cache_len=first + 9)
    model(**inputs, past_key_values=cache, use_cache=True)
    adapter: Any = find_adapter(model)
    store: dict[int, LayerTrace] = {}
    tracer = adapter.trace_layers({1: frozenset({"last_text_attention"})})
    before = collect_state(model)
    with tracer.hold(), tracer.record_into(store):
        options = {"attention_mask": longer["attention_mask"], "past_key_values": cache, "use_cache": True}
        asked = ask(model, {"input_ids": later}, 1, **options)
    assert collect_state(model) == before
    rows, positions = torch.arange(2), torch.full((2, 1), first + 2)
    expected = compute_attention(complete, rows, positions)
    for trace in (asked, store[1]):
        assert int(trace.past) == first
        weights = compute_attention(trace, rows, positions - first)[..., : first + 3]
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
    assert int(cache.get_seq_length()) == first + 3


@torch.no_grad()
def test_layers_without_attention_are_named() -> None:
    adapter: Any = find_adapter(FAMILIES["lfm2_vl"].model())
    with pytest.raises(ValueError, match=r"layer 0 of the LLM has no attention, which last_text_attention reads"):
        adapter.trace_layers({0: frozenset({"last_text_attention", "llm_hidden"})})
    adapter.trace_layers({0: frozenset({"llm_hidden"})})
    with pytest.raises(ValueError, match="layer 0 of the LLM has no attention"):
        adapter.ask_layer(0, (), {})


@torch.no_grad()
def test_a_decode_step_compiles_to_one_graph(model: Any) -> None:
    adapter: Any = find_adapter(model)
    decoder = adapter.decoder_modules.decoder
    hidden = torch.randn(2, 1, model.config.text_config.hidden_size)
    rotary = decoder.rotary_emb(hidden, torch.tensor([[4]]))
    layer, store = decoder.layers[1], dict[int, LayerTrace]()
    expected = layer(hidden, position_embeddings=rotary)
    tracer = adapter.trace_layers({1: LLM_SIGNALS - ASKED_SIGNALS})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with tracer.hold(), tracer.record_into(store):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(hidden, position_embeddings=rotary), expected)
        assert not store
        layer(hidden.expand(-1, 3, -1), position_embeddings=rotary)
        assert store.keys() == {1}
        counts = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch.equal(compiled(hidden, position_embeddings=rotary), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counts == 1


@torch.no_grad()
def test_threads_record_their_own_calls(model: Any) -> None:
    adapter: Any = find_adapter(model)
    batches = [FAMILIES["llava"].batch([(112, 112)], first=number) for number in range(4)]
    tracer = adapter.trace_layers({1: frozenset({"last_text_attention"})})
    before = collect_state(model)

    def record(batch: Any) -> LayerTrace:
        for _ in range(5):
            store: dict[int, LayerTrace] = {}
            with torch.no_grad(), tracer.record_into(store):
                model(**batch)
        return store[1]

    with tracer.hold():
        expected = [record(batch) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            traces = list(pool.map(record, batches))
    for trace, expected_trace in zip(traces, expected, strict=True):
        assert torch.equal(trace.query, expected_trace.query)  # type: ignore[arg-type]
    assert collect_state(model) == before
