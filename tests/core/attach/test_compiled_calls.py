"""``compile=True``: compiled calls give the results of calls without compilation, and leave no trace on the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.helpers.families import FAMILIES
from tests.helpers.llava import SQUARE, WIDE
from tests.helpers.oracle import collect_state, generate
from tokenprune import EncodedImage, ScoreReducer, compiled
from tokenprune.adapter import find_adapter
from tokenprune.batch import BatchSelector
from tokenprune.capabilities import Compilable
from tokenprune.catalog import strategies
from tokenprune.checks import raise_first_failure, stack_failures
from tokenprune.compiled import CompileOptions, GraphCache, compile_function
from tokenprune.geometry import TileGeometry
from tokenprune.models._base import compiled_decoder
from tokenprune.models._capture.compiled_tower import copy_sharing_weights
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import DivPrune, FasterVLM, HiRED
from tokenprune.testing.encoded_images import random_encoded_image
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import batch, tiny_model

TRACED = CompileOptions("eager", None)
"""Traces graphs and runs them without a compiler, in a second instead of minutes."""
LAYOUT = TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56)
COMPILED = sorted(name for name, family in FAMILIES.items() if issubclass(family.adapter, Compilable))


def is_compiled_without_text(kind: type[TokenReducer]) -> bool:
    """Return whether the default instance of a strategy before the LLM is one graph and needs no text model."""
    if kind.stage.name not in ("image", "projector"):
        return False
    reducer = kind(0.3)
    return reducer.is_single_graph and not reducer.reads_question


SINGLE_GRAPHS = sorted(name for name, kind in strategies().items() if is_compiled_without_text(kind))


def count_graphs() -> int:
    """Return the number of graphs of this process so far."""
    assert not torch._dynamo.utils.counters["graph_break"]
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@dataclass(frozen=True)
class Attached:
    """A model with a strategy that is attached with graphs for all tests of the module."""

    model: Any
    inputs: Any
    attachment: Any
    state: Any


@pytest.fixture(scope="module")
def attached() -> Iterator[Attached]:
    model, inputs = tiny_model("llava"), batch("llava", [SQUARE])
    logits = forward(
        model, inputs, output_hidden_states=True
    ).logits  # transformers installs capturing hooks at the first call
    state = collect_state(model)
    attachment = FasterVLM(0.3).attach(model, compile=TRACED)
    yield Attached(model, inputs, attachment, collect_state(model))
    attachment.detach()
    assert collect_state(model) == state
    assert torch.equal(forward(model, inputs).logits, logits)
    assert not {"_compiled_call", "_previous_max_cache_length"} & set(vars(model))


@contextmanager
def without_graphs(attached: Attached) -> Iterator[Any]:
    """Attach the strategy to another model with the same weights and prompts of the same width."""
    model = tiny_model("llava")
    with FasterVLM(0.3)(model, pad_to_multiple_of=compiled.COMPILED_WIDTH):
        yield model


def forward(model: Any, inputs: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)


def compare_calls(model: Any, inputs: Any, reducer: Any, options: Any, tolerance: float) -> list[int]:
    """Compare plain calls, greedy and beam search with and without compilation, and return the numbers of graphs.

    Args:
        model: the model.
        inputs: the model inputs of a batch.
        reducer: the strategy.
        options: the compiler.
        tolerance: largest allowed difference of logits.

    Returns:
        The number of new graphs after the first and after the third round of calls.
    """
    is_token, state, numbers, start = inputs["attention_mask"].bool(), collect_state(model), [], count_graphs()
    with reducer(model) as run:
        logits = forward(model, inputs).logits
        tokens, beams = generate(model, inputs), generate(model, inputs, num_beams=2)
    with reducer(model, compile=options) as compiled_run:
        for _ in range(3):
            assert torch.allclose(forward(model, inputs).logits[is_token], logits[is_token], atol=tolerance)
            assert torch.equal(generate(model, inputs), tokens)
            assert torch.equal(generate(model, inputs, num_beams=2), beams)
            numbers.append(count_graphs() - start)
        assert compiled_run.rows is not None
        assert compiled_run.rows.index.shape[1] % compiled.COMPILED_WIDTH == 0
    for selection, expected in zip(compiled_run.selections, run.selections, strict=False):
        assert torch.equal(selection.kept, expected.kept)
    assert compiled_run.account.image_count == 3 * run.account.image_count
    assert collect_state(model) == state
    return [numbers[0], numbers[2]]


def test_compiled_calls_equal_calls_without_compilation() -> None:
    """One graph each of the tower, the strategy per layout, the prefill of two and of four rows, and decoding."""
    model, inputs = tiny_model("llava_next"), batch("llava_next", [SQUARE], [SQUARE])
    forward(model, inputs)  # transformers installs capturing hooks at the first call
    assert compare_calls(model, inputs, FasterVLM(0.3), TRACED, 1e-5) == [5, 5]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("reducer", [HiRED(0.4), DivPrune(0.4)], ids=["HiRED", "DivPrune"])
def test_compiled_families_equal_calls_without_compilation(name: str, reducer: Any) -> None:
    family: Family = FAMILIES[name]
    model, inputs = family.model(), family.batch([family.sizes[0]], [family.sizes[3]])
    forward(model, inputs)
    # The tiny towers have large weights, which amplify rounding.
    first, last = compare_calls(model, inputs, reducer, True, 5e-3)
    assert first == last >= 3


def test_the_required_families_compile() -> None:
    assert {"llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"} <= set(COMPILED)


@pytest.mark.slow
def test_each_layout_and_width_has_its_graphs() -> None:
    model, start = tiny_model("llava_next"), count_graphs()
    small, wide = batch("llava_next", [SQUARE]), batch("llava_next", [WIDE])
    numbers = []
    with FasterVLM(10, newlines="drop")(model, compile=TRACED):
        for inputs in (small, wide, small, wide):
            forward(model, inputs)
            numbers.append(count_graphs() - start)
    assert numbers == [3, 5, 5, 5]  # the prefill has the same width for both layouts


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("run_call", [forward, generate])
def test_a_call_that_fails_restores_the_model(attached: Attached, run_call: Any, error: Any) -> None:
    def fail(*args: Any) -> None:
        raise error

    model, inputs = attached.model, attached.inputs
    expected = generate(model, inputs)
    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(error):
        run_call(model, inputs)
    hook.remove()
    assert torch.equal(generate(model, inputs), expected)
    assert collect_state(model) == attached.state


def test_only_the_strategy_is_compiled_at_the_full_budget() -> None:
    model, inputs, start = tiny_model("llava"), batch("llava", *[[SQUARE]] * 2), count_graphs()
    expected, tokens = forward(model, inputs), generate(model, inputs)
    with FasterVLM(1.0)(model, compile=TRACED):
        assert torch.equal(forward(model, inputs).logits, expected.logits)
        assert torch.equal(generate(model, inputs), tokens)
    assert count_graphs() == start + 1


@pytest.mark.parametrize("name", SINGLE_GRAPHS)
def test_strategies_that_are_a_single_graph_keep_the_same_tokens(name: str) -> None:
    reducer, model, inputs = strategies()[name](0.3), tiny_model("llava_next"), batch("llava_next", [SQUARE], [SQUARE])
    with reducer(model) as run:
        forward(model, inputs)
    start = count_graphs()
    with reducer(model, compile=TRACED) as compiled_run:
        forward(model, inputs)
    assert count_graphs() == start + 3  # tower, strategy and prefill
    for selection, expected in zip(compiled_run.selections, run.selections, strict=True):
        assert torch.equal(selection.kept, expected.kept)


def test_the_strategies_of_the_guide_are_single_graphs() -> None:
    assert {"FasterVLM", "HiRED", "VTCCLS"} <= set(SINGLE_GRAPHS)


def test_strategies_that_are_no_graph_run_without_compilation() -> None:
    model, inputs, start = tiny_model("llava"), batch("llava", [SQUARE]), count_graphs()
    with DivPrune(0.3)(model):
        expected = forward(model, inputs).logits
    with DivPrune(0.3)(model, compile=TRACED):
        assert torch.allclose(forward(model, inputs).logits, expected, atol=1e-5)
    assert count_graphs() == start + 2  # tower and prefill


def test_recorded_hidden_states_are_those_of_calls_without_compilation(attached: Attached) -> None:
    options = {"output_hidden_states": True}
    with without_graphs(attached) as model:
        expected = forward(model, attached.inputs, **options)
    output = forward(attached.model, attached.inputs, **options)
    for state, expected_state in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(state, expected_state, atol=1e-5)
    assert len(output.hidden_states) > 1


def get_keys(output: Any) -> Tensor:
    cache = output.get("cache", output.get("past_key_values"))
    return torch.as_tensor(cache.layers[0].keys)


@pytest.mark.parametrize("options", [None, {"return_dict_in_generate": True}], ids=["forward", "generate"])
def test_returned_caches_are_not_overwritten_by_later_calls(attached: Attached, options: Any) -> None:
    def run_call(inputs: Any) -> Any:
        return forward(attached.model, inputs) if options is None else generate(attached.model, inputs, **options)

    keys = get_keys(run_call(attached.inputs))
    stored = keys.clone()
    assert not torch.equal(get_keys(run_call(batch("llava", [SQUARE], seed=5))), stored)
    assert torch.equal(keys, stored)


def test_a_plain_call_returns_a_cache_that_continues_the_prompt(attached: Attached) -> None:
    def continue_prompt(model: Any) -> Tensor:
        cache: Any = DynamicCache(config=model.config.get_text_config())
        forward(model, attached.inputs, past_key_values=cache)
        mask = torch.zeros(1, cache.get_seq_length() + 1, dtype=torch.long)
        mask[:, -20:] = 1
        return torch.as_tensor(
            forward(model, {"input_ids": torch.tensor([[7]]), "attention_mask": mask}, past_key_values=cache).logits
        )

    with without_graphs(attached) as model:
        expected = continue_prompt(model)
    assert torch.allclose(continue_prompt(attached.model), expected, atol=1e-5)


def test_the_memory_of_a_static_cache_is_used_again(attached: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    class CountedCache(compiled_decoder.StaticCache):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            lengths.append(options["max_cache_len"])

    monkeypatch.setattr(compiled_decoder, "StaticCache", CountedCache)
    attached.attachment.pipeline.compiled.release_caches()
    expected = generate(attached.model, attached.inputs)
    start = count_graphs()
    assert torch.equal(generate(attached.model, attached.inputs), expected)
    assert count_graphs() == start
    assert lengths == [2 * compiled.COMPILED_WIDTH]
    attached.model.generate(**attached.inputs, max_new_tokens=70)
    assert lengths == [2 * compiled.COMPILED_WIDTH, 3 * compiled.COMPILED_WIDTH]


@pytest.mark.slow
def test_calls_in_and_outside_of_inference_mode_share_a_static_cache(attached: Attached) -> None:
    """Tensors of inference mode cannot be modified outside of it."""
    attached.attachment.pipeline.compiled.release_caches()
    with torch.inference_mode():
        expected = generate(attached.model, attached.inputs)
    assert torch.equal(generate(attached.model, attached.inputs), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"do_sample": True},
    ],
    ids=str,
)
def test_options_of_generate_keep_their_meaning(attached: Attached, options: dict[str, Any]) -> None:
    with without_graphs(attached) as model:
        expected = generate(model, attached.inputs, **options)
    assert torch.equal(generate(attached.model, attached.inputs, **options), expected)


def test_only_an_empty_cache_is_filled_by_the_graph_of_a_prefill(attached: Attached) -> None:
    """A chunk of any width fills the cache; a second chunk with the width of a graph must read the first one."""
    llm, states = attached.model.model.language_model, []
    embeds = torch.randn(1, 48 + compiled.COMPILED_WIDTH, llm.config.hidden_size, generator=torch.manual_seed(0))
    with torch.no_grad():
        cache: Any = DynamicCache(config=llm.config)
        expected = llm(inputs_embeds=embeds, **{compiled_decoder.CACHE_FIELD: cache}).last_hidden_state
        with attached.attachment.pipeline.compiled.attached():
            cache = attached.model._prepare_static_cache("static", 1, 200)
            for chunk in embeds.split([48, compiled.COMPILED_WIDTH], dim=1):
                output = llm(inputs_embeds=chunk, **{compiled_decoder.CACHE_FIELD: cache})
                states.append(output.last_hidden_state)
    assert torch.allclose(torch.cat(states, dim=1), expected, atol=1e-5)


def test_gradients_are_refused(attached: Attached) -> None:
    with pytest.raises(RuntimeError, match=r"compile=True computes no gradients; .* torch\.no_grad"):
        attached.model(**attached.inputs)


def test_families_without_graphs_are_refused_by_name() -> None:
    model = FAMILIES["idefics3"].model()
    attachment = HiRED(0.2)(model, compile=True)
    with pytest.raises(ValueError, match=r"does not support Idefics3\w+; it supports .*internvl, llava, llava_next"):
        attachment.attach()
    assert "generate" not in vars(model)


@dataclass(frozen=True)
class Quantizer:
    is_compileable: bool = False


def use_flash_attention(model: Any) -> None:
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"


def use_two_devices(model: Any) -> None:
    model.hf_device_map = {"model.vision_tower": 0, "lm_head": "cpu"}


def use_quantization(model: Any) -> None:
    model.hf_quantizer = Quantizer()


def use_sliding_window(model: Any) -> None:
    config = model.model.language_model.config
    config.layer_types, config.sliding_window = ["sliding_attention", "full_attention"], 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (use_flash_attention, "its attention kernel is flash_attention_2; load it with attn_implementation='sdpa'"),
        (use_two_devices, r"its weights are on several devices \(0, cpu\)"),
        (use_quantization, r"its quantization \(Quantizer\)"),
        (use_sliding_window, r"its LLM has layers whose cache is not only appended to \(DynamicLayer, DynamicSliding"),
    ],
)
def test_models_that_are_no_single_graph_are_refused(change: Any, message: str) -> None:
    model = tiny_model("llava")
    change(model)
    attachment = HiRED(0.2)(model, compile=True)
    with pytest.raises(ValueError, match=f"LlavaForConditionalGeneration: {message}"):
        attachment.attach()
    assert "generate" not in vars(model)


@dataclass
class GraphReducer(ScoreReducer):
    """A strategy that declares to be one graph; `mistake` breaks the declaration, or returns NaN."""

    mistake: str = ""
    is_single_graph = True  # type: ignore[assignment]

    def score(self, image: EncodedImage) -> Tensor:
        norms = image.features.norm(dim=-1)
        if self.mistake == "NaN":
            return norms * torch.nan
        return norms * norms.sum().item() if self.mistake == "read" else norms


def test_a_strategy_can_read_features_in_its_graph() -> None:
    images, start = [random_encoded_image(LAYOUT, seed=seed) for seed in range(3)], count_graphs()
    selector, expected = BatchSelector(GraphReducer(0.3), TRACED), BatchSelector(GraphReducer(0.3)).select(images)
    for _ in range(2):
        for selection, reference in zip(selector.select(images).selections, expected.selections, strict=True):
            assert torch.equal(selection.kept, reference.kept)
            assert (selection.token_count, selection.asked) == (reference.token_count, reference.asked)
    assert count_graphs() == start + 1


def test_a_strategy_that_is_no_graph_is_named() -> None:
    selector = BatchSelector(GraphReducer(0.3, mistake="read"), TRACED)
    with pytest.raises(RuntimeError, match=r"GraphReducer is no single graph for torch\.compile"):
        selector.select([random_encoded_image(LAYOUT)])


def test_failed_checks_of_a_graph_are_raised() -> None:
    selector = BatchSelector(GraphReducer(0.3, mistake="NaN"), TRACED)
    checks = selector.select([random_encoded_image(LAYOUT)]).checks
    with pytest.raises(ValueError, match="GraphReducer returned NaN scores"):
        raise_first_failure(checks, stack_failures(checks, torch.device("cpu")).tolist())


def test_a_graph_cache_removes_the_least_recently_used_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MAX_GRAPHS", 2)
    graphs, built = GraphCache(), []

    def build(key: str) -> Any:
        return graphs.get(key, lambda: built.append(key) or key)

    assert [build(key) for key in "abacba"] == list("abacba")
    assert built == ["a", "b", "c", "b", "a"]
    assert len(graphs) == 2


def test_each_compiled_function_has_its_own_graphs() -> None:
    def scale(value: Tensor) -> Tensor:
        return factor * value

    functions, start = [], count_graphs()
    for _ in range(12):  # more than torch's limit of graphs of one function
        functions.append(compile_function(scale, TRACED, "scale"))
    for width, function in enumerate(functions, start=1):
        factor = 2.0
        assert torch.equal(function(torch.ones(width)), 2 * torch.ones(width))
    assert count_graphs() == start + len(functions)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_copy_of_the_tower_shares_its_weights(name: str) -> None:
    tower = find_adapter(FAMILIES[name].model()).tower  # type: ignore[attr-defined]
    copied = copy_sharing_weights(tower)
    assert {id(weight) for weight in copied.parameters()} == {id(weight) for weight in tower.parameters()}
    assert {id(buffer) for buffer in copied.buffers()} == {id(buffer) for buffer in tower.buffers()}
    assert not {id(module) for module in copied.modules()} & {id(module) for module in tower.modules()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_cuda_graphs_replay_with_other_images(name: str) -> None:
    """Outputs and caches of earlier calls keep their values when a CUDA graph runs again."""
    family: Family = FAMILIES[name]
    model = family.model().cuda()
    batches = [family.batch([family.sizes[0]], first=number).to("cuda") for number in range(4)]
    with HiRED(0.4)(model):
        expected = [(forward(model, inputs), generate(model, inputs)) for inputs in batches]
    with HiRED(0.4)(model, compile=True):
        for _ in range(3):  # the first runs of a graph warm up and record
            outputs = [(forward(model, inputs), generate(model, inputs)) for inputs in batches]
    for (output, tokens), (reference, reference_tokens) in zip(outputs, expected, strict=True):
        assert torch.allclose(output.logits, reference.logits, atol=5e-3)
        assert torch.allclose(get_keys(output)[:, :, -10:], get_keys(reference)[:, :, -10:], atol=5e-3)
        assert torch.equal(tokens, reference_tokens)
