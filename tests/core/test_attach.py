"""Strategies attached to models: forward, generate, training and pipelines work on the shorter prompt."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TextIteratorStreamer, TextStreamer

from tests.helpers.oracle import build_answer, collect_state, generate, kept_mask, oracle_inputs_1d, real_positions
from tokenprune import Budget, EncodedImage, ScoreReducer, Selection, Signal, TokenReducer
from tokenprune.adapter import find_adapter
from tokenprune.strategies import FasterVLM, HiRED
from tokenprune.strategies.components import RandomSelection, UniformAllocation
from tokenprune.testing.tiny_models import batch, random_image, tiny_model, tiny_processor, tokenizer

FAMILIES = ["llava_next", "llava"]
POSITIONS = ["reindex", "preserve"]
SQUARE, WIDE, TALL, BAND = (112, 112), (60, 160), (150, 50), (40, 170)
ROWS = ([SQUARE], [WIDE, TALL], [], [BAND])
"""Different aspect ratios, several images in a row, and a row without an image."""

GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.9},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 7},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    model = tiny_model(family)
    model(**batch(family, [SQUARE]))  # transformers installs capturing hooks at the first call
    return model


@pytest.fixture
def inputs(family: str) -> Any:
    return batch(family, *ROWS)


# --- 100 %: nothing changes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_budget_is_bit_identical(family: str, attn: str, dtype: torch.dtype, inputs: Any) -> None:
    model = tiny_model(family, attn, dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    before = model(**inputs).logits
    with HiRED(1.0)(model):
        during = model(**inputs).logits
    assert torch.equal(before, during)
    assert torch.equal(before, model(**inputs).logits)


@pytest.mark.parametrize("mode", GENERATION)
def test_full_budget_generates_the_same(model: Any, inputs: Any, mode: str) -> None:
    before = generate(model, inputs, **GENERATION[mode])
    with HiRED(1.0)(model):
        during = generate(model, inputs, **GENERATION[mode])
    assert torch.equal(before, during)
    assert torch.equal(before, generate(model, inputs, **GENERATION[mode]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_full_budget_trains_the_same(family: str, side: str) -> None:
    model, inputs = tiny_model(family), batch(family, *ROWS, side=side)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    losses, gradients = [], []
    for attached in (False, True):
        model.zero_grad()
        if attached:
            with HiRED(1.0)(model):
                loss = model(**inputs, labels=labels).loss
        else:
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


# --- below 100 %: the mask oracle -------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("newlines", ["keep_rows", "drop", "keep"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_logits_equal_the_mask_oracle(family: str, positions: str, side: str, newlines: str, attn: str) -> None:
    model, inputs = tiny_model(family, attn), batch(family, *ROWS, side=side)
    with HiRED(0.2, positions=positions, newlines=newlines)(model, outputs="reduced") as run:
        short = model(**inputs).logits
    full = model(**oracle_inputs_1d(model, inputs, run, positions)).logits
    assert short.shape[1] < full.shape[1]
    difference = short[real_positions(model, inputs, run, side)] - full[kept_mask(model, inputs, run)]
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("padded", [True, False])
def test_generation_equals_the_mask_oracle(model: Any, family: str, positions: str, mode: str, padded: bool) -> None:
    """Without padding, transformers omits the mask and would treat gaps in positions as packed sequences."""
    inputs = batch(family, *(ROWS if padded else ([WIDE],)))
    with HiRED(0.2, positions=positions)(model) as run:
        short = generate(model, inputs, **GENERATION[mode])
    oracle = oracle_inputs_1d(model, inputs, run, positions)
    if positions == "reindex":
        oracle.pop("position_ids")
    else:  # generate counts positions from the attention mask of the full prompt
        oracle["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    options = GENERATION[mode] | ({"prefill_chunk_size": None} if mode == "chunked prefill" else {})
    full = generate(model, oracle, **options)
    assert torch.equal(short, full)
    width = inputs["input_ids"].shape[1]
    repeats = len(short) // len(inputs["input_ids"])
    assert torch.equal(short[:, :width], inputs["input_ids"].repeat_interleave(repeats, 0))


@pytest.mark.parametrize("source", ["argument", "config", "model"])
def test_positions_are_preserved_without_a_cache(family: str, source: str) -> None:
    """Without cache and padding, transformers would treat gaps in positions as packed sequences."""
    model, inputs = tiny_model(family), batch(family, [WIDE])
    reducer = HiRED(0.2, positions="preserve")
    with reducer(model):
        cached = generate(model, inputs)
        if source == "argument":
            assert torch.equal(generate(model, inputs, use_cache=False), cached)
        elif source == "config":
            config = copy.deepcopy(model.generation_config)
            config.use_cache = False
            assert torch.equal(generate(model, inputs, generation_config=config), cached)
        else:
            model.generation_config.use_cache = False
            assert torch.equal(generate(model, inputs), cached)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_assisted_generation_equals_greedy(model: Any, family: str, helper: str, positions: str) -> None:
    inputs = batch(family, [WIDE])
    assistant = tiny_model(family).eval()
    options = {"prompt_lookup_num_tokens": 2} if helper == "prompt lookup" else {"assistant_model": assistant}
    with HiRED(0.2, positions=positions)(model):
        greedy = generate(model, inputs)
        assisted = generate(model, inputs, **options)
    assert torch.equal(greedy, assisted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_equal_the_mask_oracle(family: str, side: str) -> None:
    """Loss and gradients are the same as for the masked full prompt with unlabeled dropped positions."""
    model, inputs = tiny_model(family), batch(family, [SQUARE], [WIDE, TALL], side=side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, : labels.shape[1] - 9] = -100
    with HiRED(0.2)(model) as run:
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("vision_tower" in name and g.abs().sum() > 0 for name, g in gradient.items())
    model.zero_grad()
    expected = model(**oracle_inputs_1d(model, inputs, run, "reindex"), labels=labels).loss
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in gradient:
            torch.testing.assert_close(gradient[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_unpadded_training_batch_gets_right_padding(family: str) -> None:
    """If the first text token has a label, it is not predicted from padding before it."""
    model = tiny_model(family)
    inputs = batch(family, [SQUARE], [SQUARE], seed=3)
    inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    inputs["input_ids"][1, -3:] = inputs["input_ids"][0, -3:]
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    with HiRED(3)(model) as run:
        loss = model(**inputs, labels=labels).loss
    is_kept = torch.ones_like(inputs["input_ids"]).bool()
    is_kept[inputs["input_ids"] == model.config.image_token_id] = torch.cat(
        [selection.packed_mask() for selection in run.selections]
    )
    rows = []
    for row, keep in enumerate(is_kept):
        row_inputs = {k: v[row : row + 1] for k, v in inputs.items() if k != "input_ids"}
        ids, mask = inputs["input_ids"][row : row + 1], keep[None].long()
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **row_inputs
        ).logits
        rows.append(torch.nn.functional.cross_entropy(logits[0, keep][:-1], labels[row, keep][1:], reduction="none"))
    expected = torch.cat(rows)[torch.cat([labels[r, k][1:] for r, k in enumerate(is_kept)]) != -100].mean()
    assert torch.allclose(loss, expected, atol=1e-5)


def test_gradient_checkpointing(family: str) -> None:
    model, inputs = tiny_model(family).train(), batch(family, [SQUARE])
    labels = inputs["input_ids"]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        with HiRED(0.2)(model):
            model(**inputs, labels=labels).loss.backward()
        gradients.append(model.base_model.multi_modal_projector.linear_1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_batch_equals_its_single_rows(model: Any, family: str, positions: str) -> None:
    with HiRED(0.2, positions=positions)(model) as run:
        batched = generate(model, batch(family, *ROWS))
    image = 0
    for number, row in enumerate(ROWS):
        inputs = single_row_inputs(family, number)
        if not row:
            expected = generate(model, inputs)
        else:
            with HiRED(0.2, positions=positions)(model) as single:
                expected = generate(model, inputs)
            for selection in single.selections:
                assert torch.equal(selection.kept, run.selections[image].kept)
                image += 1
        assert torch.equal(expected[0, -6:], batched[number, -6:])
    assert image == len(run.selections) == 4


def single_row_inputs(family: str, number: int) -> Any:
    """Return the inputs of one row of `ROWS`, processed without the remaining rows."""
    processor, full = tiny_processor(family), batch(family, *ROWS)
    images = [random_image(*size, seed=10 * number + k) for k, size in enumerate(ROWS[number])]
    ids = full["input_ids"][number][full["attention_mask"][number].bool()]
    image = tokenizer().convert_tokens_to_ids("<image>")
    text = tokenizer().decode(torch.stack([t for k, t in enumerate(ids) if t != image or ids[k - 1] != image]))
    inputs = processor(images=images or None, text=[text], return_tensors="pt")
    assert torch.equal(inputs["input_ids"][0], ids)
    return inputs


def test_positional_and_text_only_calls(model: Any, inputs: Any, family: str) -> None:
    text = tokenizer()(["how many shapes"], return_tensors="pt")
    logits, sequences = model(text["input_ids"]).logits, generate(model, text)
    with HiRED(0.2)(model):
        assert torch.equal(model(text["input_ids"]).logits, logits)
        assert torch.equal(generate(model, text), sequences)
        short = model(
            inputs["input_ids"],
            inputs["pixel_values"],
            **{k: inputs[k] for k in inputs if k in ("image_sizes", "attention_mask")},
        )
    assert short.logits.shape[1] == inputs["input_ids"].shape[1]


def test_inputs_embeds_with_pixels(model: Any, inputs: Any) -> None:
    """Embeddings in place of ids give the same logits and the same new tokens."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    image_inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
    with HiRED(0.2)(model):
        by_ids = model(**inputs).logits
        assert torch.equal(model(inputs_embeds=embeds, **image_inputs).logits, by_ids)
        new_tokens = generate(model, {"inputs_embeds": embeds, **image_inputs})
        assert torch.equal(new_tokens, generate(model, inputs)[:, -6:])


def test_zero_budget_leaves_a_text_prompt(model: Any, family: str) -> None:
    inputs = batch(family, [SQUARE], [WIDE])
    image_token = model.config.image_token_id
    ids = inputs["input_ids"]
    text = torch.stack([row[(row != image_token) & (row != 0)] for row in ids if (row != image_token).any()][:1])
    with HiRED(0)(model) as run:
        out = generate(model, inputs, num_beams=2)
    assert run.account.kept == 0
    assert torch.equal(out[:1, -6:], generate(model, {"input_ids": text}, num_beams=2)[:, -6:])


def test_one_image_of_two_keeps_no_tokens(model: Any, family: str) -> None:
    """An image without kept tokens does not shift the features of the next image, also in beam search."""

    @dataclass
    class SecondOnly(TokenReducer):
        def select(self, image: EncodedImage) -> Selection:
            kept = image.geometry.valid & (image.geometry.tile_grid != ((2, 2) if family == "llava_next" else None))
            if family == "llava":
                kept = kept & bool(image.features.mean() > threshold)
            return Selection(image.geometry, kept, asked=int(kept.sum()))

    inputs = batch(family, [SQUARE, WIDE])
    encoding = find_adapter(model).encode(inputs, ())
    first, second = (float(image.features.mean()) for image in encoding.images)
    threshold = (first + second) / 2
    with SecondOnly(newlines="drop")(model) as run:
        out = generate(model, inputs, num_beams=3)
    kept = [selection.kept_tokens for selection in run.selections]
    assert 0 in kept
    assert max(kept) > 0
    oracle = oracle_inputs_1d(model, inputs, run, "reindex")
    oracle.pop("position_ids")
    assert torch.equal(out, generate(model, oracle, num_beams=3))


# --- pipelines, streamers, limits and outputs -------------------------------------------------------------------------


def test_pipeline(model: Any, family: str) -> None:
    answer = build_answer(
        model, tiny_processor(family), random_image(*WIDE), "USER: <image> how many shapes ASSISTANT:"
    )
    before = answer()
    with HiRED(1.0)(model):
        assert answer() == before
    with HiRED(2)(model) as run:
        short = answer()
    assert run.account.kept == 2
    assert "USER" not in short


def test_streamers_receive_the_full_prompt_once(model: Any, family: str) -> None:
    inputs = batch(family, [WIDE])
    with_prompt = TextIteratorStreamer(tokenizer(), skip_prompt=False)
    without_prompt = TextIteratorStreamer(tokenizer(), skip_prompt=True)
    with HiRED(0.2)(model):
        out = generate(model, inputs, streamer=with_prompt)
        generate(model, inputs, streamer=without_prompt)
    assert "".join(with_prompt) == tokenizer().decode(out[0])
    assert "".join(without_prompt) == tokenizer().decode(out[0, inputs["input_ids"].shape[1] :])
    assert issubclass(TextIteratorStreamer, TextStreamer)


@pytest.mark.parametrize("source", ["argument", "config", "model"])
def test_total_length_limits_count_the_full_prompt(family: str, source: str) -> None:
    model, inputs = tiny_model(family), batch(family, [WIDE])
    limit = inputs["input_ids"].shape[1] + 4
    model.generation_config.eos_token_id = None
    suppress = [model.config.image_token_id]
    arguments: dict[str, Any] = {"suppress_tokens": suppress}
    if source == "argument":
        arguments |= {"max_length": limit}
    elif source == "config":
        arguments["generation_config"] = copy.deepcopy(model.generation_config)
        arguments["generation_config"].max_length = limit
    else:
        model.generation_config.max_length = limit
    with HiRED(0.2)(model):
        out = model.generate(**inputs, **arguments)
    assert out.shape[1] == limit
    if source == "config":
        assert arguments["generation_config"].max_length == limit


def test_dictionary_output_has_the_full_prompt(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model):
        plain = generate(model, inputs)
        out = generate(model, inputs, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, plain)
    assert torch.equal(out["sequences"], plain)
    assert len(out.scores) == 6


# --- leaving the block ------------------------------------------------------------------------------------------------


class InjectedError(Exception):
    pass


@dataclass
class FailingReducer(ScoreReducer):
    error: Any = InjectedError

    def score(self, image: EncodedImage) -> torch.Tensor:
        raise self.error("in the strategy")


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("failure", ["none", "strategy", "model", "interrupt", "caller"])
def test_leaving_restores_the_model(family: str, failure: str, call: str) -> None:
    model, inputs = tiny_model(family), batch(family, *ROWS)
    logits, before = model(**inputs).logits, collect_state(model)
    run_model = model if call == "forward" else lambda **kw: generate(model, kw)
    reducer: TokenReducer = FailingReducer() if failure == "strategy" else HiRED(0.2)
    call_inputs = dict(inputs)
    if failure == "model":
        call_inputs["input_ids"] = call_inputs["input_ids"][:, :-1].clone()
        call_inputs["attention_mask"] = call_inputs["attention_mask"][:, :-1]
        call_inputs["input_ids"][0, -1] = model.config.image_token_id
    error: Any = {
        "strategy": InjectedError,
        "model": ValueError,
        "interrupt": KeyboardInterrupt,
        "caller": InjectedError,
    }.get(failure)
    if failure == "interrupt":
        reducer = FailingReducer(error=KeyboardInterrupt)
    if error is None:
        with reducer(model):
            run_model(**inputs)
    else:
        with pytest.raises(error) as caught, reducer(model):  # noqa: PT012
            run_model(**call_inputs)
            raise InjectedError("in the caller")
        assert failure != "model" or "Image features and image tokens do not match" in str(caught.value)
    assert collect_state(model) == before
    assert torch.equal(model(**inputs).logits, logits)


def test_an_error_inside_the_vision_tower_restores_the_model(family: str) -> None:
    model, inputs = tiny_model(family), batch(family, [SQUARE])
    model(**inputs)  # transformers installs capturing hooks at the first call
    before = collect_state(model)
    hook = model.base_model.vision_tower.encoder.layers[-2].register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError), HiRED(0.2)(model):
        model(**inputs)
    hook.remove()
    assert collect_state(model) == before


def test_an_instance_attribute_generate_is_restored(family: str) -> None:
    model, inputs = tiny_model(family), batch(family, [SQUARE])
    replacement = type(model).generate.__get__(model)
    model.generate = replacement
    with HiRED(0.2)(model):
        generate(model, inputs)
    assert model.__dict__["generate"] is replacement


def test_copies_and_checkpoints_from_inside_the_block_are_not_reduced(family: str, tmp_path: Any) -> None:
    model, inputs = tiny_model(family), batch(family, [WIDE])
    full = generate(model, inputs)
    logits = model(**inputs).logits
    with HiRED(2)(model) as run:
        model_copy = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
        model(**inputs)
        image_count = len(run.selections)
        assert torch.equal(generate(model_copy, inputs), full)
        assert torch.equal(model_copy(**inputs).logits, logits)
        assert len(run.selections) == image_count
    assert torch.equal(generate(model_copy, inputs), full)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, logits)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_block_without_an_image_warns(model: Any) -> None:
    with pytest.warns(UserWarning, match="no image went through the model"), HiRED(0.2)(model):
        pass
    with pytest.raises(RuntimeError, match="no image went through the model"), HiRED(0.2)(model, strict=True):
        pass


def test_an_error_in_a_block_without_an_image_is_raised(model: Any) -> None:
    with pytest.raises(InjectedError), HiRED(0.2)(model):
        raise InjectedError


def test_a_second_reducer_on_a_model_is_refused(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model) as run:
        model(**inputs)
        with pytest.raises(RuntimeError, match="already attached to this model"), HiRED(0.4)(model):
            pass
        before = run.account.image_count
        model(**inputs)
        assert run.account.image_count == 2 * before


def test_the_error_for_an_unknown_model_lists_the_supported_families() -> None:
    with pytest.raises(TypeError, match=r"Linear.*llava \(LlavaForCond.*llava_next.*docs/how-to/write-an-adapter\.md"):
        HiRED(0.2)(torch.nn.Linear(2, 2)).__enter__()


def test_the_error_for_a_missing_signal_lists_required_and_provided_signals(family: str) -> None:
    model = tiny_model(family, tower="siglip")
    with pytest.raises(ValueError, match=r"needs cls_attention.*provides keys, pooling_att.*missing: cls_att"):
        HiRED(0.2, attention="cls")(model).__enter__()


def test_received_attention_replaces_cls_attention_without_a_cls_token(family: str) -> None:
    """HiRED keeps the tokens that received attention selects in place of CLS attention, and reports its signal."""
    model, inputs = tiny_model(family, tower="siglip"), batch(family, *ROWS, tower="siglip")
    with HiRED(0.2)(model) as run:
        model(**inputs)
    assert run.attention == "received_attention"
    signals = [Signal("received_attention", "first"), Signal("received_attention", "feature")]
    for image, selection in zip(find_adapter(model).encode(inputs, signals).images, run.selections, strict=True):
        cls_signals = {("cls_attention", layer): value for (_, layer), value in image.signals.items()}
        assert torch.equal(HiRED(0.2).reduce(replace(image, signals=cls_signals)).kept, selection.kept)
    clip = tiny_model(family)
    with HiRED(0.2, attention="received")(clip) as received:
        clip(**batch(family, *ROWS))
    assert received.attention == "received_attention"
    with HiRED(0.2)(clip) as cls:
        clip(**batch(family, *ROWS))
    assert cls.attention == "cls_attention"
    assert any(not torch.equal(a.kept, b.kept) for a, b in zip(cls.selections, received.selections, strict=True))


def test_selection_by_pooling_attention(family: str) -> None:
    model, inputs = tiny_model(family, tower="siglip"), batch(family, *ROWS, tower="siglip")
    with torch.no_grad():
        model.model.vision_tower.head.attention.in_proj_weight.mul_(8)
    with FasterVLM(0.2, attention="pooling")(model) as run:
        model(**inputs)
    assert run.attention == "pooling_attention"
    signals = [Signal("pooling_attention", "feature")]
    for image, selection in zip(find_adapter(model).encode(inputs, signals).images, run.selections, strict=True):
        scores = image.pooling_attention().mean(dim=1).masked_fill(~image.geometry.valid, -1)
        for tile, kept in enumerate(selection.kept):
            number = int(kept.sum())
            assert torch.equal(scores[tile].topk(number).indices.sort().values, kept.nonzero()[:, 0])
    with pytest.raises(ValueError, match="missing: pooling_attention"):
        FasterVLM(0.2, attention="pooling")(tiny_model(family)).__enter__()


def test_towers_without_cls_provide_received_attention(family: str) -> None:
    @dataclass
    class ReceivedAttention(ScoreReducer):
        @property
        def needs(self) -> tuple[Signal, ...]:
            return (Signal("received_attention", "feature"),)

        def score(self, image: EncodedImage) -> torch.Tensor:
            return image.received_attention("feature").mean(dim=1)

    model = tiny_model(family, tower="siglip")
    inputs = batch(family, [SQUARE], [WIDE], tower="siglip")
    with ReceivedAttention(0.2)(model, outputs="reduced") as run:
        short = model(**inputs).logits
    full = model(**oracle_inputs_1d(model, inputs, run, "reindex")).logits
    difference = short[real_positions(model, inputs, run, "left")] - full[kept_mask(model, inputs, run)]
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i | {"attention_mask": i["attention_mask"][:, None, None].bool()}, "2-D attention_mask"),
        (
            lambda i: (
                {k: v for k, v in i.items() if k != "attention_mask"}
                | {"position_ids": torch.arange(i["input_ids"].shape[1])[None] % 9}
            ),
            "packed sequences",
        ),
    ],
)
def test_4d_masks_and_packed_sequences_are_refused(model: Any, family: str, change: Any, message: str) -> None:
    inputs = dict(batch(family, [SQUARE]))
    with pytest.raises(ValueError, match=message), HiRED(0.2)(model):
        model(**change(inputs))


def test_conversations_from_a_reduced_cache_are_refused(model: Any, family: str) -> None:
    inputs = batch(family, [WIDE])
    with HiRED(0.2)(model):
        out = generate(model, inputs, return_dict_in_generate=True)
        next_turn = {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        with pytest.raises(ValueError, match="continues a conversation"):
            generate(model, next_turn, past_key_values=out.past_key_values)


def test_features_without_a_grid_of_patches_are_refused(family: str) -> None:
    model = tiny_model(family)
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="no grid of patches"), HiRED(0.2)(model):
        model(**batch(family, [SQUARE]))


# --- account ----------------------------------------------------------------------------------------------------------


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


def test_a_custom_attention_kernel_runs_and_reads_its_config(family: str) -> None:
    """A kernel can read its name from the config of the module, as flash attention does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    kernel_names = []

    def kernel(module: Any, *args: Any, **kwargs: Any) -> Any:
        kernel_names.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("kernel_of_a_test", kernel)
    AttentionMaskInterface.register("kernel_of_a_test", sdpa_mask)
    model, inputs = tiny_model(family, "kernel_of_a_test"), batch(family, [SQUARE])
    with HiRED(0.2)(model, outputs="reduced") as run:
        short = model(**inputs).logits
    assert set(kernel_names) == {"kernel_of_a_test"}
    assert len(kernel_names) == 3 + 2  # every required layer of the tower and every layer of the LLM, once
    sdpa = tiny_model(family)
    with HiRED(0.2)(sdpa, outputs="reduced") as sdpa_run:
        assert torch.equal(sdpa(**inputs).logits, short)
    assert torch.equal(sdpa_run.selections[0].kept, run.selections[0].kept)


def test_tiles_of_all_images_in_one_tensor(model: Any, family: str) -> None:
    """LLaVA-NeXT also accepts the tiles of a batch without padding tiles, `[all tiles, 3, height, width]`."""
    inputs = batch(family, [SQUARE], [WIDE])
    with HiRED(0.2)(model) as padded:
        expected = model(**inputs).logits
    if family == "llava_next":
        tiles = [selection.geometry.tiles for selection in padded.selections]
        inputs["pixel_values"] = torch.cat([p[:n] for p, n in zip(inputs["pixel_values"], tiles, strict=True)])
    with HiRED(0.2)(model) as flat:
        assert torch.equal(model(**inputs).logits, expected)
    for padded_selection, flat_selection in zip(padded.selections, flat.selections, strict=True):
        assert padded_selection.pixels is not None
        assert flat_selection.pixels is not None
        assert torch.equal(padded_selection.pixels, flat_selection.pixels)


def test_mixing_replaces_the_features_of_kept_tokens(model: Any, family: str) -> None:
    """One-hot rows change no feature. If every row averages all tokens, every kept token is the mean."""

    @dataclass
    class MixingReducer(TokenReducer):
        mean: bool = False

        def select(self, image: EncodedImage) -> Selection:
            kept = torch.zeros_like(image.geometry.valid)
            kept[:, ::5] = True
            kept &= image.geometry.valid
            order = image.geometry.packed[image.geometry.packed >= 0]
            rows = order[kept.flatten()[order]]
            mixing = torch.nn.functional.one_hot(rows, kept.numel()).float()
            if self.mean:
                mixing = (image.geometry.valid.flatten() / image.geometry.valid.sum()).expand(len(rows), -1)
            return Selection(image.geometry, kept, asked=len(rows), mixing=mixing)

    inputs = batch(family, [WIDE])
    with MixingReducer()(model, outputs="reduced") as run:
        one_hot = model(**inputs).logits
    full = model(**oracle_inputs_1d(model, inputs, run, "reindex")).logits
    assert (one_hot - full[kept_mask(model, inputs, run)][None]).abs().max() < 1e-5
    captured: list[Any] = []
    hook = model.base_model.register_forward_pre_hook(lambda m, a, k: captured.append(k), with_kwargs=True)
    with MixingReducer(mean=True, newlines="drop")(model) as run:
        model(**inputs)
    hook.remove()
    (features,) = captured[0]["mm_encoder_outputs"]["image"].pooler_output
    image = find_adapter(model).encode(inputs, ()).images[0]
    torch.testing.assert_close(features, image.features[image.geometry.valid].mean(0).expand_as(features))


def test_random_selection_does_not_depend_on_the_batch(model: Any, family: str) -> None:
    reducer = HiRED(0.2, allocation=UniformAllocation(), selection=RandomSelection(seed=4))
    with reducer(model) as batch_run:
        model(**batch(family, [SQUARE], [WIDE]))
    with reducer(model) as single_run:
        model(**batch(family, [WIDE], seed=10))
    assert torch.equal(batch_run.selections[1].kept, single_run.selections[0].kept)
