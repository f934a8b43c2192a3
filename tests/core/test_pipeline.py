"""Test the pipeline on running models: wrappers, threads, handles, the run record, and the length of outputs."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from threading import Thread
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, Trainer, TrainingArguments

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import kept_mask
from tokenprune import Budget, EncodedImage, Run, TileGeometry, align
from tokenprune.account import HISTORY
from tokenprune.adapter import adapters, find_adapter
from tokenprune.attach import _Hook, check_transformers, unwrap
from tokenprune.pipeline import Pipeline, PreparedCall, infer_attention_mask
from tokenprune.rewrite import Rows
from tokenprune.run import DRAWABLE
from tokenprune.selection import Selection
from tokenprune.strategies import DivPrune, FasterVLM, HiRED, PruMerge, SpatialPooling, VisionZip
from tokenprune.testing.examples import build_example
from tokenprune.testing.tiny_models import batch, tiny_model

ROWS = [[(112, 112)], [(60, 160), (150, 50)]]


@pytest.fixture
def model() -> Any:
    return tiny_model("llava_next")


@pytest.fixture
def inputs() -> Any:
    return batch("llava_next", *ROWS)


# --- wrappers ---------------------------------------------------------------------------------------------------------


def wrap_with_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()


WRAPPERS = {
    "peft": wrap_with_lora,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "compiled peft": lambda model: torch.compile(wrap_with_lora(model), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
@torch.no_grad()
def test_wrappers(inputs: Any, name: str) -> None:
    """The wrapper gives the outputs of the wrapped model, also in `generate` if it has this method."""
    model = tiny_model("llava_next")
    plain = model(**inputs).logits
    with HiRED(0.2)(model) as run:
        expected, generated = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3)
    wrapped = WRAPPERS[name](model)
    hooks_before = [list(module._forward_hooks) for module in wrapped.modules()]
    with HiRED(0.2)(wrapped) as wrapped_run:
        torch.testing.assert_close(wrapped(**inputs).logits, expected)
        if hasattr(wrapped, "generate"):
            assert torch.equal(wrapped.generate(**inputs, max_new_tokens=3), generated)
    assert torch.equal(wrapped_run.selections[0].kept, run.selections[0].kept)
    assert [list(module._forward_hooks) for module in wrapped.modules()] == hooks_before
    torch.testing.assert_close(wrapped(**inputs).logits, plain)


@torch.no_grad()
def test_attaching_to_the_model_inside_a_wrapper(model: Any, inputs: Any) -> None:
    wrapped = nn.DataParallel(model)
    assert unwrap(wrapped) == ([wrapped], model)
    with HiRED(0.2)(model) as run:
        wrapped(**inputs)
    assert run.account.image_count == 3


def test_attaching_to_a_pipeline_object_names_its_model(model: Any) -> None:
    @dataclass
    class TextPipeline:
        model: Any

    with pytest.raises(TypeError, match=r"attach the strategy to its attribute \.model"):
        HiRED(0.2)(TextPipeline(model)).attach()


def test_copies_on_several_devices_are_refused(model: Any) -> None:
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    with pytest.raises(TypeError, match="use DistributedDataParallel"), HiRED(0.2)(wrapped):
        pass


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlavaNextAdapter", "Qwen2VLAdapter", "MllamaAdapter", "Phi4MultimodalAdapter"])
def test_threads_share_one_attached_model(name: str) -> None:
    example = build_example(adapters()[name])
    model = example.adapter.model
    calls = [example.build_inputs([[size]]) for size in [(112, 112), (56, 112), (112, 56), (56, 56)]]
    suppressed = [example.adapter.image_token_id]

    def compute_logits(index: int) -> Tensor:
        options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad():
            generated = model.generate(**calls[index], suppress_tokens=suppressed, **options).logits[0]
            return torch.cat([generated, model(**calls[index]).logits[:, -1]])

    with HiRED(0.2)(model) as run:
        expected = [compute_logits(index) for index in range(4)]
        sequential_masks = [selection.kept for selection in run.selections]
    results: list[Any] = [None] * 16

    def run_thread(index: int) -> None:
        try:
            results[index] = compute_logits(index % 4)
        except Exception as error:
            results[index] = error

    plain = model(**calls[0]).logits
    with HiRED(0.2)(model) as run:
        threads = [Thread(target=run_thread, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, result in enumerate(results):
        assert isinstance(result, Tensor), result
        assert torch.equal(result, expected[index % 4])
    assert run.account.image_count == 32
    counts = [sum(torch.equal(kept, selection.kept) for selection in run.selections) for kept in sequential_masks[::2]]
    assert all(count >= 8 for count in counts)
    assert torch.equal(model(**calls[0]).logits, plain)
    assert not any("forward" in vars(module) for module in model.modules())


def test_blocks_of_several_threads_restore_the_model(model: Any, inputs: Any) -> None:
    """A second block on the same model raises an error that names the cause, in any order of the threads."""
    plain, messages = model(**inputs).logits, []

    def run_thread() -> None:
        for _ in range(3):
            try:
                with torch.no_grad(), HiRED(0.2)(model):
                    model(**inputs)
            except RuntimeError as error:
                messages.append(str(error))

    threads = [Thread(target=run_thread) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("already attached to this model" in message for message in messages)
    assert torch.equal(model(**inputs).logits, plain)
    assert "generate" not in vars(model)
    assert not any("forward" in vars(module) for module in model.modules())


# --- blocks and handles -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attach_and_detach_through_a_handle(model: Any, inputs: Any) -> None:
    plain = model(**inputs).logits
    handle = HiRED(0.2).attach(model)
    assert not torch.equal(model(**inputs).logits, plain)
    assert handle.run.account.image_count == 3
    handle.detach()
    handle.detach()
    assert torch.equal(model(**inputs).logits, plain)


def test_a_block_of_text_only_warns(model: Any, inputs: Any) -> None:
    text = {name: inputs[name][:, -5:] for name in ("input_ids", "attention_mask")}
    with pytest.warns(UserWarning, match="no image went through"), HiRED(0.2)(model):
        model(**text)
    with pytest.raises(RuntimeError, match="no image went through"), HiRED(0.2)(model, strict=True):
        model(**text)


def test_using_an_attachment_without_with_raises(model: Any) -> None:
    attachment = HiRED(0.2)(model)
    with pytest.raises(AttributeError, match="write `with HiRED"):
        attachment.generate()
    with pytest.raises(RuntimeError, match="write `with HiRED"):
        _ = attachment.run
    with pytest.warns(UserWarning, match="does not attach the strategy by itself"):
        attachment.__del__()
    attachment.attach()
    attachment.detach()


def test_an_attachment_can_be_entered_again(model: Any, inputs: Any) -> None:
    attachment = HiRED(0.2)(model)
    for _ in range(2):
        with attachment as run:
            model(**inputs)
            with pytest.raises(RuntimeError, match="attached already"):
                attachment.__enter__()
        assert run.account.image_count == 3


def test_old_transformers_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"needs transformers >= 5.23, but 5.17.0 is installed"):
        check_transformers("5.17.0")
    check_transformers("5.23.0")
    check_transformers("6.0.0.dev0")


def test_a_call_with_videos_only_is_refused() -> None:
    family = FAMILIES["llava_next_video"]
    model = family.model()
    frames = {"pixel_values_videos": torch.zeros(1, 2, 3, 56, 56), "input_ids": torch.tensor([[1, 5, 6]])}
    handle = HiRED(0.2).attach(model)
    with torch.no_grad():
        for call in (model, model.generate):
            with pytest.raises(NotImplementedError, match="videos are not reduced"):
                call(**frames)
    handle.detach()


# --- the length of outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_outputs_have_the_length_of_the_prompt(model: Any, side: str) -> None:
    """A dropped position holds the output of the last kept position before it."""
    inputs = batch("llava_next", *ROWS, [], side=side)
    with HiRED(0.2)(model, outputs="reduced") as run:
        short = model(**inputs, output_hidden_states=True)
    with HiRED(0.2)(model):
        full = model(**inputs, output_hidden_states=True)
    kept, real = kept_mask(model, inputs, run), inputs["attention_mask"].bool()
    assert full.logits.shape[:2] == inputs["input_ids"].shape
    assert len(full.hidden_states) == len(short.hidden_states)
    pairs = [(full.logits, short.logits), *zip(full.hidden_states, short.hidden_states, strict=True)]
    for long, reduced in pairs:
        for row in range(len(long)):
            states = iter(reduced[row][run.rows.mask[row]])
            last = None
            for position in range(long.shape[1]):
                last = next(states) if kept[row, position] else last
                if real[row, position] and last is not None:
                    assert torch.equal(long[row, position], last)


@pytest.mark.parametrize("keep", [1, 3, 60, torch.tensor([0, 4, -1])])
@torch.no_grad()
def test_logits_to_keep(model: Any, inputs: Any, keep: Any) -> None:
    with HiRED(0.2)(model):
        all_logits = model(**inputs).logits
        kept_logits = model(**inputs, logits_to_keep=keep).logits
    expected = all_logits[:, keep] if isinstance(keep, Tensor) else all_logits[:, -keep:]
    torch.testing.assert_close(kept_logits, expected)


@torch.no_grad()
def test_tuples_are_expanded_too(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model):
        output, output_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(output_tuple, tuple)
    assert torch.equal(output_tuple[0], output.logits)


@torch.no_grad()
def test_the_last_token_of_right_padded_rows(model: Any) -> None:
    """The state of the last real token, which embedding models pool, equals its state in a batch of one row."""
    inputs = batch("llava_next", *ROWS, side="right")
    last = inputs["attention_mask"].sum(1) - 1
    with HiRED(0.2)(model):
        batch_states = model(**inputs, output_hidden_states=True).hidden_states[-1][torch.arange(2), last]
        for row in range(2):
            row_inputs = {
                name: inputs[name][row : row + 1, : last[row] + 1] for name in ("input_ids", "attention_mask")
            }
            images = slice(0, 1) if row == 0 else slice(1, 3)
            row_inputs |= {name: inputs[name][images] for name in ("pixel_values", "image_sizes")}
            state = model(**row_inputs, output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(batch_states[row], state, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_run_records_the_remaining_positions(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model) as run:
        assert run.rows is None
        model(**inputs)
    assert run.rows is not None
    kept = kept_mask(model, inputs, run)
    for row in range(len(kept)):
        assert run.rows.index[row][run.rows.mask[row]].tolist() == kept[row].nonzero()[:, 0].tolist()
    short = align(inputs["input_ids"], run.rows, fill=-1)
    assert short.shape == run.rows.index.shape
    assert torch.equal(
        short[run.rows.mask],
        torch.cat([ids[row_kept] for ids, row_kept in zip(inputs["input_ids"], kept, strict=True)]),
    )
    assert (short[~run.rows.mask] == -1).all()
    with pytest.raises(ValueError, match="align needs a tensor of the full prompt"):
        align(short, run.rows)
    with HiRED(1.0)(model) as run:
        model(**inputs)
    assert run.rows is not None
    assert torch.equal(align(inputs["input_ids"], run.rows), inputs["input_ids"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_with_label_smoothing_and_metrics(tmp_path: Any, smoothing: float) -> None:
    model, inputs = tiny_model("llava_next"), batch("llava_next", [(112, 112)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    row = {**{name: value[0] for name, value in inputs.items()}, "labels": labels[0]}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        label_smoothing_factor=smoothing,
    )
    shapes = []

    def record_shapes(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        shapes.append((logits.shape[:2], prediction.label_ids.shape))
        return {}

    trainer = Trainer(model, arguments, train_dataset=[row], eval_dataset=[row], compute_metrics=record_shapes)
    with HiRED(0.2)(model):
        assert trainer.train().training_loss > 0
        assert trainer.evaluate()["eval_loss"] > 0
    assert shapes
    assert all(logits_shape == labels_shape for logits_shape, labels_shape in shapes)


def test_a_loss_from_logits_equals_the_loss_of_the_model(model: Any, inputs: Any) -> None:
    unlabeled = (inputs["input_ids"] == model.config.image_token_id) | (inputs["attention_mask"] == 0)
    labels = inputs["input_ids"].masked_fill(unlabeled, -100)
    labels[inputs["attention_mask"].cumsum(1) == 1] = -100  # its prediction would come from padding
    with HiRED(0.2)(model), torch.no_grad():
        model_loss = model(**inputs, labels=labels).loss
        logits = model(**inputs).logits
    external_loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(external_loss, model_loss)


def test_a_full_mask_over_a_reduced_cache_is_refused(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model) as run, torch.no_grad():
        output = model(**inputs, use_cache=True)
        step = {"input_ids": output.logits[:, -1:].argmax(-1), "past_key_values": output.past_key_values}
        ones_column = torch.ones(2, 1, dtype=torch.long)
        with pytest.raises(ValueError, match=r"tokenprune.align\(attention_mask, run.rows\)"):
            model(**step, attention_mask=torch.cat([inputs["attention_mask"], ones_column], 1))
        short = torch.cat([align(inputs["attention_mask"], run.rows), ones_column], 1)
        positions = short.cumsum(1)[:, -1:] - 1
        continued = model(**step, attention_mask=short, position_ids=positions).logits[:, -1].argmax(-1)
        generated = model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(generated[:, -1], continued)


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_run_does_not_hold_the_model(inputs: Any) -> None:
    model = tiny_model("llava_next")
    with HiRED(0.2)(model) as run:
        model.generate(**inputs, max_new_tokens=1)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert run.account.image_count == 3


@pytest.mark.parametrize("reducer", [HiRED(0.2), VisionZip(0.2), PruMerge(0.2)], ids=lambda r: type(r).__name__)
@torch.no_grad()
def test_later_selections_are_compact(model: Any, reducer: Any) -> None:
    call = batch("llava_next", [(112, 112)])
    with reducer(model) as run:
        for _ in range(DRAWABLE + 2):
            model(**call)
    first, last = run.selections[0], run.selections[-1]
    assert first.pixels is not None
    assert last.pixels is None
    assert last.scores is None
    assert last.mixing is None
    assert torch.equal(first.kept, last.kept)
    tensors = [value for field in fields(last) if isinstance(value := getattr(last, field.name), Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) < 4096


def test_a_run_is_bounded(model: Any) -> None:
    layout = TileGeometry.single((2, 2))
    selection = Selection(layout, torch.ones(1, 4, dtype=torch.bool), asked=4)
    run = Run("HiRED", find_adapter(model).llm)
    for _ in range(HISTORY + 50):
        run.add([selection], Rows.unchanged(torch.ones(1, 6)), [(6, 6)])
    assert len(run.selections) == len(run.account.images) == len(run.account.prompt_lengths) == HISTORY
    assert run.account.image_count == run.account.row_count == HISTORY + 50
    assert run.account.kept == 4 * (HISTORY + 50)


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_the_mask_is_inferred_from_padding_as_generate_does(model: Any, inputs: Any) -> None:
    class Config:
        pad_token_id, eos_token_id = 0, [2]

    mask = infer_attention_mask(inputs["input_ids"], {}, Config, Config)
    assert mask is not None
    assert torch.equal(mask, inputs["attention_mask"])
    assert infer_attention_mask(inputs["input_ids"], {"eos_token_id": 0}, Config, Config) is None
    assert infer_attention_mask(inputs["input_ids"], {"pad_token_id": 390}, Config, Config) is None
    inputs_without_mask = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with HiRED(0.2)(model), torch.no_grad():
        assert torch.equal(
            model.generate(**inputs_without_mask, max_new_tokens=3), model.generate(**inputs, max_new_tokens=3)
        )


@torch.no_grad()
def test_half_precision_does_not_overflow() -> None:
    model, inputs = tiny_model("llava_next", attn="sdpa"), batch("llava_next", [(112, 112)])
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.bias.add_(220.0)
        layer.self_attn.k_proj.bias.add_(220.0)
    half_model = copy.deepcopy(model).half()
    half_inputs = {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}
    assert bool(half_model(**half_inputs).logits.isfinite().all())
    for reducer in (FasterVLM(0.2), HiRED(0.2), HiRED(0.2, attention="received")):
        with reducer(half_model) as run:
            half_model(**half_inputs)
        assert run.account.kept == run.account.asked


@pytest.mark.parametrize("reducer", [HiRED(0.2), VisionZip(0.2), PruMerge(0.2), SpatialPooling(0.2), DivPrune(0.2)])
@torch.no_grad()
def test_a_vision_side_of_another_dtype(inputs: Any, reducer: Any) -> None:
    """A float32 tower in a bfloat16 model keeps the same tokens as a float32 model."""
    model = tiny_model("llava_next")
    with reducer(model) as run:
        model(**inputs)
    model.to(torch.bfloat16)
    reference = tiny_model("llava_next")
    for name in ("vision_tower", "multi_modal_projector"):
        module = getattr(model.model, name).float()
        module.load_state_dict(getattr(reference.model, name).state_dict())
    with reducer(model) as mixed_run:
        model.generate(**inputs, max_new_tokens=1)
    for selection, mixed_selection in zip(run.selections, mixed_run.selections, strict=True):
        assert torch.equal(selection.kept, mixed_selection.kept)


# --- the contract of a strategy ---------------------------------------------------------------------------------------


def test_features_are_computed_when_they_are_read() -> None:
    """`dataclasses.replace` and the methods of an image do not compute the features."""
    from dataclasses import replace

    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.ones(1, 4, 3)

    image = EncodedImage(TileGeometry.single((2, 2)), compute_features=compute, device="cpu")
    flattened = replace(image.with_signals({("keys", 0): torch.zeros(1, 1, 4, 2)}), layers=3).flatten_tiles()
    assert not calls
    assert flattened.features.shape == (1, 4, 3)
    assert image.features is image.features
    assert len(calls) == 1
    assert image.with_features(torch.zeros(1, 4, 3)).features.sum() == 0
    with pytest.raises(TypeError, match="features"):
        EncodedImage(TileGeometry.single((2, 2)))


@pytest.mark.parametrize("name", sorted(adapters()))
def test_layouts_need_no_encoding(name: str) -> None:
    adapter_class = adapters()[name]
    if not adapter_class.supports_transformers():
        pytest.skip("the unmodified model raises in the installed transformers")
    example = build_example(adapter_class)
    adapter, inputs = example.adapter, example.build_inputs([[(112, 112)], [(60, 112)]])
    raising_hook = getattr(adapter, "tower", adapter.model).register_forward_pre_hook(lambda *_: 1 / 0)
    layouts = adapter.layouts(inputs)
    raising_hook.remove()
    with torch.no_grad():
        images = adapter.encode(inputs, ()).images
    assert [len(layout.packed) for layout in layouts] == [len(image.geometry.packed) for image in images]


def test_a_prepared_call_equals_a_call_inside_the_block(model: Any, inputs: Any) -> None:
    pipeline = Pipeline(HiRED(Budget(20)), find_adapter(model))
    call = pipeline.prepare(inputs)
    assert call.is_shortened
    assert call.inputs["input_ids"].shape == call.rows.index.shape
    with call.enter_contexts(), torch.no_grad():
        logits = model(**call.inputs).logits
    with HiRED(Budget(20))(model, outputs="reduced"), torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert [selection.kept_tokens for selection in call.selections] == [20, 20, 20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with HiRED(0.2)(model) as run:
            model(**inputs)
    assert "HiRED" in repr(run)


@torch.no_grad()
def test_a_model_prepared_by_accelerate(inputs: Any) -> None:
    from accelerate import Accelerator

    model = tiny_model("llava_next")
    with HiRED(0.2)(model):
        expected, generated = model(**inputs).logits, model.generate(**inputs, max_new_tokens=2)
    prepared = Accelerator(cpu=True).prepare(model)
    with HiRED(0.2)(prepared):
        torch.testing.assert_close(prepared(**inputs).logits, expected)
        assert torch.equal(prepared.generate(**inputs, max_new_tokens=2), generated)


@torch.no_grad()
def test_distributed_data_parallel(inputs: Any, tmp_path: Any) -> None:
    model = tiny_model("llava_next")
    with HiRED(0.2)(model):
        expected = model(**inputs).logits
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with HiRED(0.2)(wrapped) as run:
            torch.testing.assert_close(wrapped(**inputs).logits, expected)
        assert run.account.image_count == 3
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def test_an_assistant_model_with_an_attached_reducer(model: Any) -> None:
    inputs, assistant = batch("llava_next", [(60, 160)]), tiny_model("llava_next")
    handle = HiRED(0.2).attach(assistant)
    with HiRED(0.2)(model):
        greedy = model.generate(**inputs, max_new_tokens=5)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, assistant_model=assistant), greedy)
    handle.detach()


@torch.no_grad()
def test_a_model_without_a_cache(model: Any) -> None:
    """Generation without a cache gives the same tokens if `use_cache=False` comes from the generation config."""
    inputs, config = batch("llava_next", [(60, 160)]), GenerationConfig(max_new_tokens=4, pad_token_id=0)
    with HiRED(0.2, positions="preserve")(model):
        expected = model.generate(**inputs, generation_config=config, use_cache=False)
        model.generation_config.use_cache = False
        config.use_cache = None
        assert torch.equal(model.generate(**inputs, generation_config=config), expected)


@torch.no_grad()
def test_an_interrupt_inside_a_call(model: Any, inputs: Any) -> None:
    """The call after an interrupted call gives the logits of the unmodified model."""
    text = {name: inputs[name][:, -5:] for name in ("input_ids", "attention_mask")}
    plain = model(**text).logits

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with HiRED(0.2)(model):
        hook = model.get_output_embeddings().register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        hook.remove()
        assert torch.equal(model(**text).logits, plain)


@torch.no_grad()
def test_positional_arguments_of_a_wrapper(inputs: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny_model("llava_next"), config).eval()
    vision = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    plain = wrapped(inputs["input_ids"], inputs["attention_mask"], **vision).logits
    with HiRED(1.0)(wrapped):
        assert torch.equal(wrapped(inputs["input_ids"], inputs["attention_mask"], **vision).logits, plain)


@torch.no_grad()
def test_more_logits_than_positions_and_tuples_by_config(model: Any, inputs: Any) -> None:
    with HiRED(0.2)(model):
        logits = model(**inputs).logits
        assert torch.equal(model(**inputs, logits_to_keep=10_000).logits, logits)
        model.config.return_dict = False
        assert torch.equal(model(**inputs)[0], logits)


def list_hooks(model: Any) -> list[Any]:
    """Return all hooks and replaced methods of a model."""
    replaced = [set(vars(module)) & {"forward", "generate"} for module in model.modules()]
    return [[(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()], replaced]


@torch.no_grad()
@pytest.mark.parametrize("family", ["mllama", "phi4_multimodal"])
def test_an_interrupt_that_leaves_the_block(family: str) -> None:
    """A family that holds contexts during a call has its original outputs after the block, also in other threads."""
    model = tiny_model(family)
    inputs = batch(family, [(112, 112)])
    plain, before = model(**inputs).logits, list_hooks(model)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.get_output_embeddings().register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), HiRED(0.2)(model):
        model(**inputs)
    hook.remove()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(model(**inputs).logits), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert torch.equal(results[0], plain)
    assert list_hooks(model) == before


@torch.no_grad()
def test_detach_during_a_call_of_another_thread(model: Any, inputs: Any) -> None:
    """The call in progress stays reduced, and its hooks are removed when it ends."""
    plain, entered, resume = model(**inputs).logits, threading.Event(), threading.Event()
    before = list_hooks(model)

    def block_call(*args: Any) -> None:
        entered.set()
        resume.wait(60)

    handle = HiRED(0.2).attach(model)
    expected = model(**inputs).logits
    hook = model.get_output_embeddings().register_forward_pre_hook(block_call)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(model(**inputs).logits))
    thread.start()
    entered.wait(60)
    handle.detach()
    hook.remove()
    assert torch.equal(model(**inputs).logits, plain)
    resume.set()
    thread.join()
    assert torch.equal(results[0], expected)
    assert list_hooks(model) == before


@torch.no_grad()
def test_a_reduced_cache_is_refused_in_a_later_block(model: Any, inputs: Any) -> None:
    """A cache of a reduced prompt raises; caches of full prompts stay usable after a reduced call."""
    text_inputs = {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_sizes")}
    full_cache = model(**inputs, use_cache=True).past_key_values
    extended = {name: torch.cat([value, value[:, -1:]], dim=1) for name, value in text_inputs.items()}
    next_inputs = {**extended, "input_ids": extended["input_ids"][:, -1:]}
    plain = model(**next_inputs, past_key_values=copy.deepcopy(full_cache)).logits
    with HiRED(0.2)(model):
        reduced = model(**inputs, use_cache=True).past_key_values
        generated = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
        assert torch.equal(model(**next_inputs, past_key_values=copy.deepcopy(full_cache)).logits, plain)
        continued = model.generate(**extended, past_key_values=copy.deepcopy(full_cache), max_new_tokens=2)
    assert torch.equal(
        continued, model.generate(**extended, past_key_values=copy.deepcopy(full_cache), max_new_tokens=2)
    )
    with FasterVLM(0.2)(model):
        model(**inputs)
        for cache in (reduced, generated, copy.deepcopy(reduced)):
            with pytest.raises(ValueError, match="cache that holds a reduced prompt"):
                model.generate(**extended, past_key_values=cache, max_new_tokens=2)
            with pytest.raises(ValueError, match="of a reduced prompt"):
                model(**next_inputs, past_key_values=cache)


@torch.no_grad()
def test_a_mask_over_image_tokens_is_refused(model: Any, inputs: Any) -> None:
    mask = inputs["attention_mask"].clone()
    mask[0, (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[3:8, 0]] = 0
    masked_inputs = {**inputs, "attention_mask": mask}
    plain = model(**masked_inputs).logits
    with HiRED(1.0)(model):
        assert torch.equal(model(**masked_inputs).logits, plain)
    with HiRED(0.2)(model):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="hides image tokens"):
                call(**masked_inputs)
        model(**inputs)


def test_shifted_labels_are_refused(model: Any, inputs: Any) -> None:
    labels = inputs["input_ids"]
    shifted_labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    with HiRED(0.2)(model), pytest.raises(ValueError, match="shift_labels"):
        model(**inputs, labels=labels, shift_labels=shifted_labels)


@torch.no_grad()
def test_copies_and_pickles_made_inside_the_block(model: Any, inputs: Any) -> None:
    """Copies are unmodified models without a reference to the strategy."""
    with HiRED(0.2)(model) as run:
        copies = [pickle.loads(pickle.dumps(model))]  # transformers' own hooks cannot be pickled after a call
        model(**inputs)
        copies.append(copy.deepcopy(model))
    assert run.account.image_count == 3
    copies.append(pickle.loads(pickle.dumps(copies[0])))
    plain, expected = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3)
    for model_copy in copies:
        assert torch.equal(model_copy(**inputs).logits, plain)
        assert torch.equal(model_copy.generate(**inputs, max_new_tokens=3), expected)
        assert not any(isinstance(hook, _Hook) for hook in model_copy._forward_hooks.values())
        with HiRED(0.2)(model_copy) as run:
            model_copy(**inputs)
        assert run.account.image_count == 3


@torch.no_grad()
def test_virtual_tokens_of_prompt_tuning(inputs: Any) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = get_peft_model(tiny_model("llava_next"), config).eval()
    plain = wrapped(**inputs).logits
    with HiRED(0.2)(wrapped, outputs="reduced"):
        reduced = wrapped(**inputs).logits
    with HiRED(0.2)(wrapped) as run:
        logits = wrapped(**inputs).logits
    assert logits.shape == plain.shape
    assert torch.equal(logits[:, :4], reduced[:, :4])
    assert torch.equal(logits[:, 4:], run.rows.expand(reduced[:, 4:]))


@torch.no_grad()
def test_hooks_are_removed_after_an_interrupted_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["phi4_multimodal"].model()
    inputs = FAMILIES["phi4_multimodal"].batch([(112, 112)])
    model(**inputs)
    state = list_hooks(model)

    @contextmanager
    def fail(self: Any) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    def call_from_thread() -> None:
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)

    handle = HiRED(0.2).attach(model)
    with monkeypatch.context() as patch:
        patch.setattr(PreparedCall, "enter_contexts", fail)
        thread = threading.Thread(target=call_from_thread)
        thread.start()
        thread.join()
    handle.detach()
    assert list_hooks(model) == state
