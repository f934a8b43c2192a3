"""Runs a strategy on a live model: encodes the images of a call, selects tokens, rewrites the prompt, records.

`Pipeline` is the only entry to a live model. The `with` block, its `generate`, evaluation, benchmarks and integrations
prepare their calls here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.adapter import Adapter, Encoding, FeatureInputs
from tokenprune.batch import BatchSelection, BatchSelector
from tokenprune.budget import as_budget, format_budget
from tokenprune.caches import count_cached, find_reduced_cache, mark_caches
from tokenprune.capabilities import Resizable, require_capability
from tokenprune.checks import defer_checks
from tokenprune.compiled import CompiledLLM, CompileOptions, check_gradients, compile_llm
from tokenprune.contracts import check_needs
from tokenprune.decoder.plan import DecoderPlan
from tokenprune.decoder.prompt import PromptLayout, restrict_layouts
from tokenprune.decoder.strategy import BoundDecoderReducer
from tokenprune.encoder.patches import PatchRecord
from tokenprune.encoder.tokens import restrict_images, select_remaining, widen_selections
from tokenprune.generation import GenerateOptions, check_arguments, generate_reduced
from tokenprune.geometry import TileGeometry
from tokenprune.image import LLM_SIGNALS, EncodedImage, Signal
from tokenprune.packing import KeptPositions, pack_masks, read_counts
from tokenprune.pixels import PixelSelector
from tokenprune.prepared_call import CallRecord, PreparedCall
from tokenprune.requirements import (
    describe_attention,
    describe_missing_signals,
    describe_missing_steps,
    list_patch_reducers,
)
from tokenprune.rewrite import (
    PromptSummary,
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
    resolve_attention_source,
    resolve_needs,
)
from tokenprune.selection import Selection
from tokenprune.signal_reader import SignalReader
from tokenprune.stages import EntryStage, order_positions

if TYPE_CHECKING:
    from tokenprune.encoder_reducer import EncoderReducer
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
        for part in reducer.list_parts():
            check_needs(part)
        self.reducer, self.adapter = reducer, adapter
        self.keep_pixels, self.pad_to_multiple_of = keep_pixels, pad_to_multiple_of
        self.signal = resolve_attention_source(reducer.attention, adapter.provides)
        """The kind of signal that replaces CLS attention, or ``"saliency_model"``."""
        self.patch_reducers: list[EncoderReducer] = list_patch_reducers(reducer)
        """The strategies that drop or merge patches inside the vision tower."""
        pixel_part: Any = next((part for part in reducer.list_parts() if part.stage.reads_pixels), None)
        if problem := describe_missing_signals(reducer, adapter) or describe_missing_steps(reducer, adapter):
            raise ValueError(problem)
        self.pixel_selector = None if pixel_part is None else PixelSelector(pixel_part, adapter)
        """Applies the strategy that drops tokens by their pixels; None without one."""
        budget = format_budget(reducer.budget_label)
        self.run = Run(reducer.label, adapter.llm, describe_attention(reducer, adapter), budget)
        """The record of all calls."""
        self._generate: Any = getattr(adapter.model, "generate", None)  # the original method, bound before attaching
        entries = [(part, part.stage) for part in reducer.list_parts() if isinstance(part.stage, EntryStage)][-1:]
        self.signal_reader = SignalReader(reducer, adapter, self.signal, question, tokenizer)
        """Adds the signals that do not come from the vision tower of the model."""
        tower_needs = [signal for signal in self.signal_reader.needs if signal.kind not in LLM_SIGNALS]
        self.needs = resolve_needs(tower_needs, self.signal)
        """The signals to capture in the vision tower for the strategy."""
        self.entry: TokenReducer | None = entries[0][0] if entries else None
        """The strategy before the LLM; None without one."""
        self._stage: EntryStage | None = entries[0][1] if entries else None
        self.batch_selector = None if self.entry is None else BatchSelector(self.entry, compile_options)
        """Applies the strategy before the LLM to the images of a call; None without one."""
        decoder: Any = next((part for part in reducer.list_parts() if part.stage.reads_llm), None)
        self.decoder = None if decoder is None else BoundDecoderReducer(decoder, adapter)
        """The strategy inside the LLM, bound to the layers; None without one."""
        self.compiled = compile_llm(adapter, compile_options, pad_to_multiple_of)
        """The compiled language model; None if nothing is compiled."""
        if self.compiled is not None and self.decoder is not None:
            raise ValueError(
                f"compile=True does not support {reducer.label}, which drops tokens inside the LLM; attach it without "
                "compile=True"
            )
        if self.compiled is not None and (self.patch_reducers or self.pixel_selector is not None):
            raise ValueError(
                f"compile=True does not support {reducer.label}, which drops patches of the vision tower; attach it "
                "without compile=True"
            )
        self._lock = threading.RLock()
        self._local = threading.local()

    @property
    def is_generating(self) -> bool:
        """Whether this thread is inside the model's own `generate`; its prompt is already reduced."""
        return getattr(self._local, "depth", 0) > 0

    def hold_hooks(self) -> AbstractContextManager[None]:
        """Return a context that keeps the hooks of the strategy inside the LLM on its layers.

        Calls place the hooks by themselves. Hold them for calls that continue from a cache or train with gradient
        checkpointing.
        """
        return nullcontext() if self.decoder is None else self.decoder.hold()

    def encode(self, inputs: Mapping[str, Any]) -> Encoding:
        """Return the complete encoding of the images of a call, to share between strategies and budgets.

        Args:
            inputs: the model inputs of the call.
        """
        return self._encode(inputs, truncated=False, patch_reducers=())

    @property
    def reduces_patches(self) -> bool:
        """Whether a strategy drops or merges patches before or inside the vision tower."""
        return bool(self.patch_reducers) or self.pixel_selector is not None

    def select_entering(self, encoding: Encoding) -> Sequence[Selection] | None:
        """Return the selection of each image whose patches enter the vision tower; None if all patches enter it.

        Args:
            encoding: the complete encoding of `encode`.
        """
        return select_entering(self._select_by_pixels(encoding.inputs))

    def reduce_patches(
        self,
        encoding: Encoding,
        entering: Sequence[Selection] | None,
        needs: Sequence[Signal] | None = None,
    ) -> Encoding:
        """Return the images encoded once more by the strategies before and inside the vision tower.

        If all patches remain, or if the patches of the encoding are already reduced, the encoding is returned.

        Args:
            encoding: the complete encoding of `encode`.
            entering: the result of `select_entering`.
            needs: the signals to capture, if other strategies share the result; None captures those of this strategy.
        """
        if encoding.patches is not None:
            return encoding
        layouts = [image.geometry for image in encoding.images]
        if entering is None and self._keeps_all_patches(layouts, encoding.inputs):
            return encoding
        return encoding.reduce_patches(self.needs if needs is None else needs, self.patch_reducers, entering)

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
            with self.hold_hooks():  # also for calls that continue from a cache with dropped tokens
                yield
        finally:
            _GENERATING.reset(token)
            self._local.depth -= 1

    def _encode(
        self,
        inputs: Mapping[str, Any],
        truncated: bool,
        patch_reducers: Sequence[EncoderReducer],
        entering: Sequence[Selection] | None = None,
    ) -> Encoding:
        keep_pixels, text_model = self.run.drawable if self.keep_pixels else 0, self.reducer.text_model
        if self._stage is not None:
            options = (keep_pixels, text_model, truncated or bool(patch_reducers), patch_reducers, entering)
            return self._stage.encode(self.adapter, inputs, self.needs, *options)
        if self.needs:
            return self.adapter.encode(inputs, self.needs, keep_pixels, text_model)
        return require_capability(self.adapter, Resizable).build_unencoded(inputs, keep_pixels)

    def _grants_all_tokens(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether all tokens enter the LLM; the images must then be encoded completely."""
        if self.entry is None or self.entry.stage.reduces_patches:
            return True
        budget = as_budget(self.entry.budget)
        if isinstance(budget.amount, float):
            return budget.amount >= 1.0
        return all(budget.asked(layout) >= len(layout.packed) for layout in self.adapter.layouts(inputs))

    def _prepare(
        self, inputs: dict[str, Any], for_generate: bool, encoding: Encoding | None, use_cache: bool
    ) -> PreparedCall:
        adapter, reducer = self.adapter, self.entry
        adapter.check_inputs(inputs)
        if self.compiled is not None:
            check_gradients()
        placeholders, attention_mask = adapter.placeholders(inputs), inputs.get("attention_mask")
        past = count_cached(inputs) if reducer is None else 0
        new_placeholders = placeholders[:, past:] if for_generate else placeholders
        new_mask = None
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:  # others: `check_arguments`
            new_mask = attention_mask[:, -new_placeholders.shape[1] :]
        # The device still has no work to wait for.
        prompts = summarize_prompts(new_placeholders, new_mask)
        by_pixels = self._select_by_pixels(inputs if encoding is None else encoding.inputs)
        with defer_checks() as checks:
            encoding, is_shared = self._encode_call(inputs, for_generate, encoding, by_pixels)
        lengths = [len(image.geometry.packed) for image in encoding.images]
        if adapter.has_prompt_tokens and sum(prompts.placeholders) != sum(lengths):
            check_arguments(inputs, for_generate)  # a filled cache is the cause if only the new images are passed
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {sum(prompts.placeholders)}, "
                f"features: {sum(lengths)}; make the inputs with the processor that belongs to the model"
            )
        row_of_image, patches = prompts.find_rows(lengths), self._record_patches(encoding)
        images, saliency_flops = self.signal_reader.add_attention(encoding)
        images = self.signal_reader.add_questions(images, inputs, row_of_image, len(placeholders))
        mask = placeholders.new_ones(placeholders.shape) if attention_mask is None else attention_mask
        if self.batch_selector is None or reducer is None or self._stage is None:
            selections = [Selection.all_tokens(image.geometry, image.pixels) for image in images]
            record = CallRecord(selections, prompts, row_of_image, [], saliency_flops, patches)
            entering = self._prepare_unchanged(inputs, encoding, is_shared, record, mask, for_generate)
            return self._add_cuts(entering, record, images, inputs, for_generate, past)
        batch = self._select(self.batch_selector, images, encoding, by_pixels)
        batch = replace(batch, checks=[*checks, *batch.checks])
        packed_mask = pack_masks(batch.selections)
        side = adapter.text_separator_side if reducer.text_separators == "drop_empty" else "none"
        emptied = None if side == "none" else find_emptied_text(placeholders, packed_mask, lengths, side)
        selections, emptied_counts, is_checked = read_counts(batch.selections, packed_mask, batch.checks, emptied)
        if not is_checked:
            self.run.store_checks(batch.checks)
        record = CallRecord(selections, prompts, row_of_image, emptied_counts, saliency_flops, patches)
        if all(selection.is_identity for selection in selections):
            entering = self._prepare_unchanged(inputs, encoding, is_shared, record, mask, for_generate)
            return self._add_cuts(entering, record, images, inputs, for_generate)
        check_arguments(inputs, for_generate)
        self._check_hidden_images(prompts)
        text = self._select_text(inputs)
        kept_positions = KeptPositions.from_mask(packed_mask, selections)
        packed = self._stage.gather_features(adapter, encoding, images, selections, kept_positions)
        kept = order_positions(selections, kept_positions)
        features = adapter.features_to_inputs(encoding, packed, kept)
        if not adapter.has_prompt_tokens:
            rows = Rows.unchanged(mask)
            self._record(record, rows, prompts.tokens)
            contexts = self._list_contexts(features)
            return PreparedCall({**text, **features.inputs}, rows, selections, contexts=contexts, features=packed)
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
        contexts = self._list_contexts(features, self.compiled)
        entering = PreparedCall({**reduced, **features.inputs}, rows, selections, True, contexts, packed)
        return self._add_cuts(entering, record, images, inputs, for_generate, kept=kept)

    def _encode_call(
        self, inputs: Mapping[str, Any], for_generate: bool, shared: Encoding | None, by_pixels: Sequence[Selection]
    ) -> tuple[Encoding, bool]:
        """Return the encoding of a call as its strategies read it, and whether it was shared by the caller.

        Args:
            inputs: keyword inputs of `forward` or `generate`.
            for_generate: whether `inputs` are passed to `generate`.
            shared: the encoding that the caller passed; None encodes the pixels of `inputs`.
            by_pixels: the selections before the vision tower.
        """
        entering = select_entering(by_pixels)
        if shared is not None:
            return self.reduce_patches(shared, entering), True
        vision = {k: v for k, v in inputs.items() if not (for_generate and k.startswith("output_"))}
        keeps_patches = not self.patch_reducers or self._keeps_all_patches(self.adapter.layouts(inputs), inputs)
        drops_tokens = any(not selection.is_identity for selection in by_pixels)
        truncated = drops_tokens or not (keeps_patches and self._grants_all_tokens(inputs))
        patch_reducers = () if keeps_patches else self.patch_reducers
        return self._encode(vision, truncated, patch_reducers, entering), False

    def _keeps_all_patches(self, layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]) -> bool:
        """Return whether no strategy inside the vision tower drops or merges a patch of images."""
        return not self.patch_reducers or self.adapter.keeps_all_patches(self.patch_reducers, layouts, inputs)

    def _record_patches(self, encoding: Encoding) -> PatchRecord | None:
        """Return the patches that remained in the vision tower; None without a strategy before or inside it."""
        if encoding.patches is not None or not self.reduces_patches:
            return encoding.patches
        images = encoding.images[: len(encoding.images) // encoding.repeats]
        full = self.adapter.count_patches([image.geometry for image in images], encoding.inputs)
        return PatchRecord(None, full, full)

    def _select_by_pixels(self, vision: Mapping[str, Any]) -> list[Selection]:
        """Return the selection of each image by its pixels, with counts; empty without such a strategy."""
        if self.pixel_selector is None:
            return []
        batch = self.pixel_selector.select(vision)
        selections, _, is_checked = read_counts(batch.selections, pack_masks(batch.selections), batch.checks)
        if not is_checked:
            self.run.store_checks(batch.checks)
        return selections

    def _select(
        self,
        batch_selector: BatchSelector,
        images: Sequence[EncodedImage],
        encoding: Encoding,
        by_pixels: Sequence[Selection],
    ) -> BatchSelection:
        """Return the selection of each image among the tokens that the vision tower kept.

        Args:
            batch_selector: applies the strategy before the LLM.
            images: the encoded images.
            encoding: the encoding of the images.
            by_pixels: the selections before the vision tower.
        """
        reads_pixels = self.entry is not None and self.entry.stage.reads_pixels
        if reads_pixels or (by_pixels and not any(selection.kept_tokens for selection in by_pixels)):
            pairs = zip(list(by_pixels) * encoding.repeats, images, strict=True)
            return BatchSelection([replace(selection, pixels=image.pixels) for selection, image in pairs], [])
        record = encoding.patches
        kept = None if record is None or record.kept is None else list(record.kept) * encoding.repeats
        if self.entry is not None and self.entry.stage.reads_tower_layer:
            return BatchSelection(select_remaining(images, kept, self.entry.newlines), [])
        if kept is None or self.entry is None:
            return batch_selector.select(images)
        restricted = restrict_images(images, kept)
        batch = batch_selector.select(restricted)
        return replace(batch, selections=widen_selections(batch.selections, images, self.entry.newlines))

    def _prepare_unchanged(
        self,
        inputs: dict[str, Any],
        encoding: Encoding,
        is_shared: bool,
        record: CallRecord,
        mask: Tensor,
        for_generate: bool,
    ) -> PreparedCall:
        """Return the unchanged call, so that its output equals the output of the unmodified model."""
        rows, selections, text = Rows.unchanged(mask), record.selections, self._select_text(inputs)
        if not (encoding.is_complete or is_shared or encoding.patches is not None):
            return PreparedCall(inputs, rows, selections)  # the model encodes the images itself
        if self.adapter.has_vision_positions and inputs.get("position_ids") is None:
            text["position_ids"] = self.adapter.compute_position_ids({**encoding.inputs, **inputs}, for_generate)
        packed = encoding.packed
        if encoding.is_complete:
            features = self.adapter.complete_inputs(encoding)
        else:
            features = self.adapter.features_to_inputs(encoding, packed)
        contexts = self._list_contexts(features)
        return PreparedCall({**text, **features.inputs}, rows, selections, contexts=contexts, features=packed)

    def _select_text(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of a call that do not belong to the vision side."""
        return {name: value for name, value in inputs.items() if name not in self.adapter.image_inputs}

    def _check_hidden_images(self, prompts: PromptSummary) -> None:
        """Raise an error if the attention mask hides tokens of an image."""
        if self.adapter.has_prompt_tokens and prompts.hides_images:
            raise ValueError(
                "the attention_mask hides image tokens, but a reduced prompt cannot omit them; remove the image and "
                "its tokens from the call, or set budget=1.0"
            )

    def _add_cuts(
        self,
        call: PreparedCall,
        record: CallRecord,
        images: Sequence[EncodedImage],
        inputs: Mapping[str, Any],
        for_generate: bool,
        past: int = 0,
        kept: Sequence[Tensor] | None = None,
    ) -> PreparedCall:
        """Return the call with the cuts inside the LLM, or record the call if there are none.

        Args:
            call: the call with the tokens that enter the LLM.
            record: the numbers of the call.
            images: the encoded images.
            inputs: the inputs of the caller.
            for_generate: whether the inputs are for `generate`.
            past: length of the sequence in the cache.
            kept: the position of each token that enters the LLM in its packed image; None if all enter.
        """
        lengths = record.reduced_lengths if call.is_shortened else list(record.prompts.tokens)
        if self.decoder is None:
            self._record(record, call.rows, lengths)
            return call
        layouts = restrict_layouts([image.geometry.original for image in images], kept)
        if not self.decoder.keeps_all(layouts):
            check_arguments(inputs, for_generate, shortens=call.is_shortened)
            self._check_hidden_images(record.prompts)
        placeholders = self.adapter.placeholders(call.inputs)[:, past if for_generate else 0 :]
        prompt = PromptLayout(placeholders, call.rows.mask, lengths, layouts, record.row_of_image, past=past)

        decoder = self.decoder

        def add_record(plan: DecoderPlan) -> None:
            row_lengths = plan.row_lengths(record.prompts.tokens, self.adapter.llm.layers)
            signal_flops = decoder.count_signal_flops(plan)
            cuts = plan.list_cuts()
            self.run.store_checks(plan.checks)
            flops = (record.saliency_flops, cuts, signal_flops)
            self.run.add(record.selections, call.rows, row_lengths, *flops, record.patches)

        return decoder.add_to_call(call, prompt, images, inputs, add_record)

    def _list_contexts(
        self, features: FeatureInputs, compiled: CompiledLLM | None = None
    ) -> tuple[AbstractContextManager[Any], ...]:
        """Return the contexts of a call; the first of them is the lock if a context changes the model."""
        parts = (features.context, None if compiled is None else compiled.attached())
        contexts = tuple(context for context in parts if context is not None)
        return (self._lock, *contexts) if contexts else ()

    def _record(self, record: CallRecord, rows: Rows, reduced: Sequence[int]) -> None:
        lengths = list(zip(record.prompts.tokens, reduced, strict=True))
        self.run.add(record.selections, rows, lengths, record.saliency_flops, patches=record.patches)

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
        if self.entry is not None and self.entry.positions == "reindex":
            return None if for_generate else self.adapter.count_position_ids(rows.mask)
        position_ids = inputs.get("position_ids")
        computed = self.adapter.compute_position_ids(inputs, for_generate) if position_ids is None else position_ids
        full = torch.as_tensor(computed)
        return gather_position_ids(full.expand(*full.shape[:-2], len(rows.index), -1), rows)

    def _pad_token_id(self) -> int:
        """Return the id for padding: positions are masked, so any id except the image placeholder is valid."""
        model = self.adapter.model
        for config in (getattr(model, "generation_config", None), model.config.get_text_config(), model.config):
            pad = getattr(config, "pad_token_id", None)
            if isinstance(pad, int) and pad >= 0 and pad != self.adapter.image_token_id:
                return pad
        return 0 if self.adapter.image_token_id else 1


def select_entering(by_pixels: Sequence[Selection]) -> Sequence[Selection] | None:
    """Return the selections whose patches enter the vision tower; None if all patches enter it.

    A tower needs at least one patch. If no image keeps a token, the tower runs on all patches.

    Args:
        by_pixels: the selections before the vision tower.
    """
    drops_tokens = any(not selection.is_identity for selection in by_pixels)
    return by_pixels if drops_tokens and any(selection.kept_tokens for selection in by_pixels) else None


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
