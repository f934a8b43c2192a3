"""Runs a strategy on a live model: encodes the images of a call, selects tokens, rewrites the prompt, records.

`Pipeline` is the only entry to a live model. The `with` block, its `generate`, evaluation, benchmarks and integrations
prepare their calls here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.adapter import Adapter, Encoding, FeatureInputs
from tokenprune.batch import BatchSelector
from tokenprune.budget import as_budget
from tokenprune.caches import find_reduced_cache, mark_caches
from tokenprune.capabilities import ReadsQuestion, ShowsTiles, require_capability
from tokenprune.compiled import CompiledLLM, CompileOptions, check_gradients, compile_llm
from tokenprune.generation import GenerateOptions, check_arguments, generate_reduced
from tokenprune.image import TEXT_SIGNALS, EncodedImage
from tokenprune.layers import resolve_layers
from tokenprune.packing import KeptPositions, pack_masks, read_counts
from tokenprune.prepared_call import CallRecord, PreparedCall
from tokenprune.requirements import describe_attention, describe_missing_signals
from tokenprune.rewrite import (
    Rows,
    find_emptied_text,
    gather_position_ids,
    infer_attention_mask,
    shorten_inputs,
    shorten_rows,
    summarize_prompts,
)
from tokenprune.run import Run
from tokenprune.saliency import (
    SaliencyModel,
    list_attention_layers,
    resolve_attention_source,
    resolve_needs,
    with_cls_substitute,
    with_saliency,
)
from tokenprune.stages import order_positions

if TYPE_CHECKING:
    from tokenprune.reducer import TokenReducer

_GENERATING: ContextVar[bool] = ContextVar("generating", default=False)
"""Whether this thread is inside `generate` of any attached model; the prompts of assistant models are then reduced."""


class Pipeline:
    """A strategy bound to a live model.

    Calls from several threads are safe: encoding is serialized, and so are whole calls of models that need a context
    while they run.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
        question: the question of all prompts, or one per prompt row; None reads it from the prompt.
        tokenizer: decodes the prompt; None loads the tokenizer from the folder or hub id of the model.
        keep_pixels: whether the selections of the first images store their pixels for drawing.
        pad_to_multiple_of: number of which the width of a reduced prompt is a multiple; 1 adds no padding.
        compile_options: compiles tower, reducer and language model; None compiles nothing.

    Raises:
        ValueError: if the adapter does not provide a needed signal, the strategy reads the question without a text
            model, or a part of the model cannot be compiled.
    """

    def __init__(
        self,
        reducer: TokenReducer,
        adapter: Adapter,
        question: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        keep_pixels: bool = True,
        pad_to_multiple_of: int = 1,
        compile_options: CompileOptions | None = None,
    ) -> None:
        self.reducer, self.adapter, self.question, self.tokenizer = reducer, adapter, question, tokenizer
        self.keep_pixels, self.pad_to_multiple_of = keep_pixels, pad_to_multiple_of
        self.signal = resolve_attention_source(reducer.attention, adapter.provides)
        """The kind of signal that replaces CLS attention, or ``"saliency_model"``."""
        self.needs = resolve_needs(reducer.needs, self.signal)
        """The signals to capture for the strategy."""
        if problem := describe_missing_signals(reducer, adapter):
            raise ValueError(problem)
        self.run = Run(type(reducer).__name__, adapter.llm, describe_attention(reducer, adapter))
        """The record of all calls."""
        self._generate: Any = getattr(adapter.model, "generate", None)  # the original method, bound before attaching
        self.batch_selector = BatchSelector(reducer, compile_options)
        """Applies the strategy to the images of a call."""
        self.compiled = compile_llm(adapter, compile_options, pad_to_multiple_of)
        """The compiled language model; None if nothing is compiled."""
        self._lock = threading.RLock()
        self._local = threading.local()

    @property
    def is_generating(self) -> bool:
        """Whether this thread is inside the model's own `generate`; its prompt is already reduced."""
        return getattr(self._local, "depth", 0) > 0

    def encode(self, inputs: Mapping[str, Any]) -> Encoding:
        """Return the complete encoding of the images of a call, to share between strategies and budgets.

        Args:
            inputs: the model inputs of the call.
        """
        return self._encode(inputs, truncated=False)

    def prepare(
        self,
        inputs: Mapping[str, Any],
        for_generate: bool = False,
        encoding: Encoding | None = None,
        use_cache: bool = True,
    ) -> PreparedCall:
        """Return one call with its images reduced, and record it.

        Args:
            inputs: keyword inputs of `forward` or `generate`.
            for_generate: whether `inputs` are passed to `generate`.
            encoding: the encoded images of the call (`encode`). An image that occurs several times is reduced once. By
                default the pixels of `inputs` are encoded, and only as far as the kept tokens require.
            use_cache: whether `generate` will use a key-value cache.

        Raises:
            ValueError: if the placeholders do not match the images, or the call cannot be reduced.
        """
        with self._lock:
            return self._prepare(dict(inputs), for_generate, encoding, use_cache)

    def generate(
        self,
        inputs: Mapping[str, Any],
        generation_config: Any = None,
        encoding: Encoding | None = None,
    ) -> Any:
        """Generate from the reduced prompt with the model's own `generate`.

        Args:
            inputs: keyword arguments of `generate`.
            generation_config: as in `generate`.
            encoding: the encoded images of the call, as in `prepare`.

        Returns:
            The result of `generate`; sequences begin with the full prompt.
        """
        model, inputs, generate = self.adapter.model, dict(inputs), self._generate
        has_images = self.adapter.has_images(inputs)
        if self.is_generating or (_GENERATING.get() and not has_images):
            with self._inside_generate():  # an assistant model inside `generate`: its prompt is already reduced
                return generate(generation_config=generation_config, **inputs)
        if encoding is None and not has_images:
            self._check_without_images(inputs)
            with self._inside_generate():
                return generate(generation_config=generation_config, **inputs)
        config = model.generation_config if generation_config is None else generation_config
        options = (inputs.get("use_cache"), config.use_cache, model.generation_config.use_cache)
        use_cache = next((option for option in options if option is not None), True)
        with torch.no_grad():
            if inputs.get("attention_mask") is None and inputs.get("input_ids") is not None:
                inputs["attention_mask"] = infer_attention_mask(
                    inputs["input_ids"], inputs, config, model.generation_config
                )
            call = self.prepare(inputs, for_generate=True, encoding=encoding, use_cache=use_cache)
        return self.generate_prepared(call, inputs.get("input_ids"), generation_config)

    def generate_prepared(
        self, call: PreparedCall, prompt: Tensor | None, generation_config: Any = None, **options: Any
    ) -> Any:
        """Generate from a prepared call with the model's own `generate`.

        Args:
            call: the result of `prepare`.
            prompt: the ids of the full prompt, `[rows, length]`; None if it was given as embeddings.
            generation_config: as in `generate`.
            options: more keyword arguments of `generate`.

        Returns:
            The result of `generate`; sequences begin with the full prompt.
        """
        inputs, default = {**call.inputs, **options}, self.adapter.model.generation_config
        compiled = self.compiled if call.is_shortened else None
        if compiled is not None:
            inputs |= compiled.select_cache(GenerateOptions(inputs, generation_config, default))
        with call.enter_contexts(), self._inside_generate():
            if call.is_reduced:
                mark_caches(inputs)
            if call.is_shortened:
                output = generate_reduced(self._generate, inputs, generation_config, default, prompt, call.rows)
            else:
                output = self._generate(generation_config=generation_config, **inputs)
            if call.is_reduced:
                mark_caches(output)
            if compiled is not None and not isinstance(output, Tensor):
                compiled.release_caches()  # an output object can contain the cache
            return output

    @contextmanager
    def _inside_generate(self) -> Iterator[None]:
        self._local.depth = getattr(self._local, "depth", 0) + 1
        token = _GENERATING.set(True)
        try:
            yield
        finally:
            _GENERATING.reset(token)
            self._local.depth -= 1

    def _encode(self, inputs: Mapping[str, Any], truncated: bool) -> Encoding:
        keep_pixels, text_model = self.run.drawable if self.keep_pixels else 0, self.reducer.text_model
        return self.reducer.stage.encode(self.adapter, inputs, self.needs, keep_pixels, text_model, truncated)

    def _grants_all_tokens(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether the budget grants all tokens; the images must then be encoded completely."""
        budget = as_budget(self.reducer.budget)
        if isinstance(budget.amount, float):
            return budget.amount >= 1.0
        return all(budget.asked(layout) >= len(layout.packed) for layout in self.adapter.layouts(inputs))

    def _prepare(
        self, inputs: dict[str, Any], for_generate: bool, encoding: Encoding | None, use_cache: bool
    ) -> PreparedCall:
        adapter, reducer = self.adapter, self.reducer
        adapter.check_inputs(inputs)
        if self.compiled is not None:
            check_gradients()
        placeholders, attention_mask = adapter.placeholders(inputs), inputs.get("attention_mask")
        is_prompt_mask = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2  # others: `check_arguments`
        # The device still has no work to wait for.
        prompts = summarize_prompts(placeholders, attention_mask if is_prompt_mask else None)
        if encoding is None:
            vision = {k: v for k, v in inputs.items() if not (for_generate and k.startswith("output_"))}
            encoding, is_shared = self._encode(vision, truncated=not self._grants_all_tokens(inputs)), False
        else:
            is_shared = True
        lengths = [len(image.geometry.packed) for image in encoding.images]
        if adapter.has_prompt_tokens and sum(prompts.placeholders) != sum(lengths):
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {sum(prompts.placeholders)}, "
                f"features: {sum(lengths)}; make the inputs with the processor that belongs to the model"
            )
        row_of_image = prompts.find_rows(lengths)
        images, saliency_flops = self._add_attention(encoding)
        images = self._add_questions(images, inputs, row_of_image, len(placeholders))
        batch = self.batch_selector.select(images)
        mask = placeholders.new_ones(placeholders.shape) if attention_mask is None else attention_mask
        packed_mask = pack_masks(batch.selections)
        side = adapter.text_separator_side if reducer.text_separators == "drop_empty" else "none"
        emptied = None if side == "none" else find_emptied_text(placeholders, packed_mask, lengths, side)
        selections, emptied_counts, is_checked = read_counts(batch.selections, packed_mask, batch.checks, emptied)
        if not is_checked:
            self.run.store_checks(batch.checks)
        text = {name: value for name, value in inputs.items() if name not in adapter.image_inputs}
        record = CallRecord(selections, prompts, row_of_image, emptied_counts, saliency_flops)
        if all(selection.is_identity for selection in selections):
            return self._prepare_unchanged(inputs, text, encoding, is_shared, record, mask, for_generate)
        check_arguments(inputs, for_generate)
        if adapter.has_prompt_tokens and prompts.hides_images:
            raise ValueError(
                "the attention_mask hides image tokens, but a reduced prompt cannot omit them; remove the image and "
                "its tokens from the call, or set budget=1.0"
            )
        kept_positions = KeptPositions.from_mask(packed_mask, selections)
        packed = reducer.stage.gather_features(adapter, encoding, images, selections, kept_positions)
        features = adapter.features_to_inputs(encoding, packed, order_positions(selections, kept_positions))
        if not adapter.has_prompt_tokens:
            rows = Rows.unchanged(mask)
            self._record(record, rows, prompts.tokens)
            return PreparedCall({**text, **features.inputs}, rows, selections, contexts=self._list_contexts(features))
        preserves_positions = reducer.positions == "preserve"
        # Without a cache, transformers treats gaps in position ids as packed sequences unless a position is masked.
        spare = int(for_generate and preserves_positions and not use_cache)
        padding = "left" if spare else prompts.padding_side(inputs.get("labels") is not None)
        rows = shorten_rows(
            placeholders, mask, packed_mask, padding, max(record.reduced_lengths, default=0) + spare, emptied
        )
        unpadded_width, rows = rows.index.shape[1], rows.pad_left(self.pad_to_multiple_of)
        reduced = shorten_inputs(text, rows, self._pad_token_id())
        if (first := rows.index.shape[1] - unpadded_width) and reduced.get("labels") is not None:
            reduced["labels"][:, first] = -100  # without padding, no position predicts the first token
        reduced.pop("position_ids", None)
        if (positions := self._compute_position_ids(inputs, rows, for_generate)) is not None:
            reduced["position_ids"] = positions
        self._record(record, rows, record.reduced_lengths)
        contexts = self._list_contexts(features, self.compiled)
        return PreparedCall({**reduced, **features.inputs}, rows, selections, True, contexts)

    def _prepare_unchanged(
        self,
        inputs: dict[str, Any],
        text: dict[str, Any],
        encoding: Encoding,
        is_shared: bool,
        record: CallRecord,
        mask: Tensor,
        for_generate: bool,
    ) -> PreparedCall:
        """Return the unchanged call, so that its output equals the output of the unmodified model."""
        rows, selections = Rows.unchanged(mask), record.selections
        self._record(record, rows, record.prompts.tokens)
        if not (encoding.is_complete or is_shared):
            return PreparedCall(inputs, rows, selections)  # the model encodes the images itself
        if self.adapter.has_vision_positions and inputs.get("position_ids") is None:
            text["position_ids"] = self.adapter.compute_position_ids({**encoding.inputs, **inputs}, for_generate)
        if encoding.is_complete:
            features = self.adapter.complete_inputs(encoding)
        else:
            features = self.adapter.features_to_inputs(encoding, encoding.packed)
        return PreparedCall({**text, **features.inputs}, rows, selections, contexts=self._list_contexts(features))

    def _list_contexts(
        self, features: FeatureInputs, compiled: CompiledLLM | None = None
    ) -> tuple[AbstractContextManager[Any], ...]:
        """Return the contexts of a call; the first of them is the lock if a context changes the model."""
        parts = (features.context, None if compiled is None else compiled.attached())
        contexts = tuple(context for context in parts if context is not None)
        return (self._lock, *contexts) if contexts else ()

    def _record(self, record: CallRecord, rows: Rows, reduced: Sequence[int]) -> None:
        lengths = list(zip(record.prompts.tokens, reduced, strict=True))
        self.run.add(record.selections, rows, lengths, record.saliency_flops)

    def _check_without_images(self, inputs: Mapping[str, Any]) -> None:
        """Raise an error if a call without images cannot run.

        Raises:
            ValueError: if the cache holds a reduced prompt and the ids contain image placeholders.
            NotImplementedError: if the call has videos but no images.
        """
        if self.adapter.has_only_videos(inputs):
            raise NotImplementedError(
                f"{type(self.reducer).__name__} is attached, but videos are not reduced, and this call has videos and "
                f"no image ({self.adapter.video_pixels} without {self.adapter.pixels}); run it outside the block"
            )
        ids = inputs.get("input_ids")
        if ids is None or find_reduced_cache(inputs) is None:
            return
        if bool((ids == self.adapter.image_token_id).any()):
            raise ValueError(
                "this continues a conversation from a cache that holds a reduced prompt, but input_ids hold the full "
                "prompt. Generate from the whole conversation, with its images and without past_key_values"
            )

    def check_forward(self, inputs: Mapping[str, Any]) -> None:
        """Raise an error if a plain call without images continues a reduced prompt with a mask of the full prompt.

        Args:
            inputs: keyword inputs of `forward`.

        Raises:
            ValueError: if the attention mask is longer than the cache and the new tokens together.
            NotImplementedError: if the call has videos but no images.
        """
        self._check_without_images(inputs)
        mask, cache = inputs.get("attention_mask"), find_reduced_cache(inputs)
        tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if cache is None or tokens is None or not isinstance(mask, Tensor):
            return
        stored = int(cache.get_seq_length())
        if mask.dim() == 2 and mask.shape[1] > stored + tokens.shape[1] and self.adapter.has_prompt_tokens:
            raise ValueError(
                f"the attention_mask has {mask.shape[1]} positions, but the cache holds {stored} of a reduced prompt "
                f"and the call adds {tokens.shape[1]}; shorten the part of the prompt with "
                "tokenprune.align(attention_mask, run.rows), or use generate"
            )

    def _compute_position_ids(self, inputs: Mapping[str, Any], rows: Rows, for_generate: bool) -> Tensor | None:
        """Return the position ids of the reduced prompt, `[..., rows, width]`; None if `generate` computes them."""
        if self.reducer.positions == "reindex":
            return None if for_generate else self.adapter.count_position_ids(rows.mask)
        position_ids = inputs.get("position_ids")
        computed = self.adapter.compute_position_ids(inputs, for_generate) if position_ids is None else position_ids
        full = torch.as_tensor(computed)
        return gather_position_ids(full.expand(*full.shape[:-2], len(rows.index), -1), rows)

    def _add_attention(self, encoding: Encoding) -> tuple[list[EncodedImage], int]:
        """Return the images with the signal that replaces CLS attention, and the FLOPs of the saliency model."""
        source, needs = self.reducer.attention, self.reducer.needs
        count = len(encoding.images) // encoding.repeats
        unique = encoding.images[:count]
        if not isinstance(source, SaliencyModel) or not list_attention_layers(needs):
            return [with_cls_substitute(image, needs, self.signal) for image in unique] * encoding.repeats, 0
        adapter = require_capability(self.adapter, ShowsTiles)
        tiles = adapter.read_tiles(encoding.inputs, [image.geometry for image in unique])
        is_set = source.image_mean is not None and source.image_std is not None
        mean, std = (source.image_mean, source.image_std) if is_set else adapter.pixel_mean_std()
        images, total = [], 0
        for image, pixels in zip(unique, tiles, strict=True):
            shift, scale = (pixels.new_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
            colors = (pixels.float() * scale + shift).clamp(0, 1)
            salient, flops = with_saliency(image, source, colors, needs)
            images.append(salient)
            total += flops
        return images * encoding.repeats, total

    def _add_questions(
        self, images: list[EncodedImage], inputs: Mapping[str, Any], row_of_image: Sequence[int], rows: int
    ) -> list[EncodedImage]:
        """Return the images with the question signals of their prompt row; unchanged if the strategy reads none.

        Raises:
            ValueError: if a prompt row has no question, or the number of questions differs from the number of rows.
        """
        needs = [signal for signal in self.reducer.needs if signal.kind in TEXT_SIGNALS]
        if not needs:
            return images
        questions = self._read_questions(inputs, rows)
        adapter = require_capability(self.adapter, ReadsQuestion)
        vectors = {text: adapter.embed_question(text, self.reducer.text_model) for text in dict.fromkeys(questions)}
        images_with_question: dict[tuple[EncodedImage, str], EncodedImage] = {}
        for image, row in zip(images, row_of_image, strict=True):
            text = questions[row]
            if (image, text) not in images_with_question:
                signals = {
                    (signal.kind, layer): vectors[text][signal.kind]
                    for signal in needs
                    for layer in resolve_layers(signal.layer, image.layers, image.feature_layer)
                }
                images_with_question[image, text] = image.with_signals(signals)
        return [images_with_question[i, questions[row]] for i, row in zip(images, row_of_image, strict=True)]

    def _read_questions(self, inputs: Mapping[str, Any], rows: int) -> list[str]:
        """Return the question of each prompt row."""
        if self.question is not None:
            questions = [self.question] * rows if isinstance(self.question, str) else list(self.question)
            if len(questions) != rows:
                raise ValueError(
                    f"{len(questions)} questions were given for a batch of {rows} prompts; give one per row"
                )
        elif inputs.get("input_ids") is None:
            raise ValueError(
                f"{type(self.reducer).__name__} reads the question, but inputs_embeds hold no text; "
                "attach with reducer(model, question=...)"
            )
        else:
            adapter = require_capability(self.adapter, ReadsQuestion)
            questions = adapter.read_questions(inputs["input_ids"], inputs.get("attention_mask"), self.tokenizer)
        for row, text in enumerate(questions):
            if not text.strip():
                raise ValueError(
                    f"prompt row {row} holds no question besides its images, but {type(self.reducer).__name__} reads "
                    "the question; attach with reducer(model, question=...)"
                )
        return questions

    def _pad_token_id(self) -> int:
        """Return the id for padding: positions are masked, so any id except the image placeholder is valid."""
        model = self.adapter.model
        for config in (getattr(model, "generation_config", None), model.config.get_text_config(), model.config):
            pad = getattr(config, "pad_token_id", None)
            if isinstance(pad, int) and pad >= 0 and pad != self.adapter.image_token_id:
                return pad
        return 0 if self.adapter.image_token_id else 1


def call_generate(model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    """Return ``model.generate(**inputs, **options)``, with the strategy that is attached to the model, if any.

    Args:
        model: the model.
        inputs: keyword arguments of `generate`.
        options: more keyword arguments of `generate`.
    """
    return model.generate(**inputs, **options)


@contextmanager
def count_tower_passes(adapter: Adapter) -> Iterator[list[int]]:
    """Count the passes through the vision tower inside the block.

    Args:
        adapter: the adapter of the model.

    Yields:
        A list with one number: the passes so far. If the adapter has no `tower`, the number remains 0.
    """
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    tower = getattr(adapter, "tower", None)
    hook = None if tower is None else tower.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        if hook is not None:
            hook.remove()
