"""The execution path of a strategy: encode the images of a call, select tokens, rewrite the prompt, record.

`Pipeline` is the only entry to a live model. The `with` block, its `generate`, evaluation, benchmarks and integrations
all prepare their calls here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from tokenprune.adapter import Adapter, Encoding, FeatureInputs
from tokenprune.budget import as_budget
from tokenprune.generation import generate_reduced, refuse_arguments
from tokenprune.image import TEXT_SIGNALS, EncodedImage
from tokenprune.layers import resolve_layers
from tokenprune.rewrite import Rows, emptied_text, kept_positions, padding_side, shorten, shorter_rows
from tokenprune.run import Run
from tokenprune.saliency import (
    SaliencyModel,
    attention_layers,
    attention_source,
    read_from,
    with_cls_substitute,
    with_saliency,
)
from tokenprune.selection import Selection
from tokenprune.stages import entering_places

if TYPE_CHECKING:
    from tokenprune.reducer import TokenReducer

_GENERATING: ContextVar[bool] = ContextVar("generating", default=False)
"""Whether this thread is inside `generate` of any attached model; assistant models then get reduced prompts."""


@dataclass(frozen=True, eq=False)
class PreparedCall:
    """One call of a model with its images reduced.

    Args:
        inputs: keyword inputs of `forward` or `generate`.
        rows: the positions of the full prompt that remain.
        selections: one per image.
        is_shortened: whether the prompt differs from that of the caller.
        contexts: the contexts to hold while the model runs.
    """

    inputs: dict[str, Any]
    rows: Rows
    selections: list[Selection]
    is_shortened: bool = False
    contexts: tuple[AbstractContextManager[Any], ...] = ()

    @property
    def is_reduced(self) -> bool:
        """Whether an image lost tokens."""
        return not all(selection.everything for selection in self.selections)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the contexts of the call inside the block."""
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            yield


class Pipeline:
    """A strategy bound to a live model.

    Calls from several threads are safe: encoding is serialized, and so are whole calls of models that need a context
    while they run.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
        question: the question of all prompts, or one per prompt row; None reads it from the prompt.
        tokenizer: decodes the prompt; None takes that of the folder or hub id from which the model was loaded.
        keep_pixels: whether the first images keep their pixels for drawing.

    Raises:
        ValueError: if the adapter does not provide a needed signal, or the strategy reads the question without a text
            model.
    """

    def __init__(
        self,
        reducer: TokenReducer,
        adapter: Adapter,
        question: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        keep_pixels: bool = True,
    ) -> None:
        self.reducer, self.adapter, self.question, self.tokenizer = reducer, adapter, question, tokenizer
        self.keep_pixels = keep_pixels
        self.signal = attention_source(reducer.attention, adapter.provides)
        """The kind of signal that replaces CLS attention; or ``"saliency_model"``."""
        self.needs = read_from(reducer.needs, self.signal)
        """The signals that are captured for the strategy."""
        if problem := lacking(reducer, adapter):
            raise ValueError(problem)
        self.run = Run(type(reducer).__name__, adapter.llm, attention_name(reducer, adapter))
        """The record of all calls."""
        self._generate: Any = getattr(adapter.model, "generate", None)  # before anything is attached
        self._lock = threading.RLock()
        self._local = threading.local()

    @property
    def is_generating(self) -> bool:
        """Whether this thread is inside the model's own `generate`, whose calls are reduced already."""
        return getattr(self._local, "depth", 0) > 0

    def encode(self, inputs: Mapping[str, Any]) -> Encoding:
        """Encode the images of a call completely, for several strategies and budgets.

        Args:
            inputs: the model inputs of the call.
        """
        return self._encode(inputs, truncated=False)

    def prepare(
        self,
        inputs: Mapping[str, Any],
        generating: bool = False,
        encoding: Encoding | None = None,
        cached: bool = True,
    ) -> PreparedCall:
        """Return one call with its images reduced, and record it.

        Args:
            inputs: keyword inputs of `forward` or `generate`.
            generating: whether they go to `generate`.
            encoding: the encoded images of the call (`encode`). An image that is listed several times is reduced once.
                By default the pixels of `inputs` are encoded, and only as far as the kept tokens require.
            cached: whether `generate` will use a key-value cache.

        Raises:
            ValueError: if the placeholders do not match the images, or the call cannot be reduced.
        """
        with self._lock:
            return self._prepare(dict(inputs), generating, encoding, cached)

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
        model, inputs, own = self.adapter.model, dict(inputs), self._generate
        has_images = self.adapter.has_images(inputs)
        if self.is_generating or (_GENERATING.get() and not has_images):
            with self._inside_generate():  # an assistant model inside `generate`: the prompt is reduced already
                return own(generation_config=generation_config, **inputs)
        if encoding is None and not has_images:
            self._check_without_images(inputs)
            with self._inside_generate():
                return own(generation_config=generation_config, **inputs)
        config = model.generation_config if generation_config is None else generation_config
        choices = (inputs.get("use_cache"), config.use_cache, model.generation_config.use_cache)
        cached = next((choice for choice in choices if choice is not None), True)
        with torch.no_grad():
            if inputs.get("attention_mask") is None and inputs.get("input_ids") is not None:
                inputs["attention_mask"] = inferred_mask(inputs["input_ids"], inputs, config, model.generation_config)
            call = self.prepare(inputs, generating=True, encoding=encoding, cached=cached)
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
        with call.held(), self._inside_generate():
            if call.is_reduced:
                mark_caches(inputs)
            if call.is_shortened:
                output = generate_reduced(self._generate, inputs, generation_config, default, prompt, call.rows)
            else:
                output = self._generate(generation_config=generation_config, **inputs)
            if call.is_reduced:
                mark_caches(output)
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

    def _keeps_everything(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether the budget grants all tokens, so that a complete encoding is needed."""
        budget = as_budget(self.reducer.budget)
        if isinstance(budget.amount, float):
            return budget.amount >= 1.0
        return all(budget.asked(layout) >= len(layout.packed) for layout in self.adapter.layouts(inputs))

    def _prepare(
        self, inputs: dict[str, Any], generating: bool, encoding: Encoding | None, cached: bool
    ) -> PreparedCall:
        adapter, reducer = self.adapter, self.reducer
        if encoding is None:
            adapter.check_inputs(inputs)
            vision = {k: v for k, v in inputs.items() if not (generating and k.startswith("output_"))}
            encoding, is_shared = self._encode(vision, truncated=not self._keeps_everything(inputs)), False
        else:
            is_shared = True
        placeholders = adapter.placeholders(inputs)
        lengths = [len(image.geometry.packed) for image in encoding.images]
        if adapter.in_prompt and int(placeholders.sum()) != sum(lengths):
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {int(placeholders.sum())}, "
                f"features: {sum(lengths)}; make the inputs with the processor that belongs to the model"
            )
        images, second_look_flops = self._with_attention(encoding)
        images = self._with_questions(images, inputs, placeholders, lengths)
        selections = reduce_once(reducer, images)
        attention_mask = inputs.get("attention_mask")
        mask = placeholders.new_ones(placeholders.shape) if attention_mask is None else attention_mask
        text = {name: value for name, value in inputs.items() if name not in adapter.image_inputs}
        if all(selection.everything for selection in selections):
            return self._keep_everything(
                inputs, text, encoding, is_shared, selections, mask, generating, second_look_flops
            )
        refuse_arguments(inputs, generating)
        if adapter.in_prompt and bool((placeholders & (mask == 0)).any()):
            raise ValueError(
                "the attention_mask hides image tokens, and these cannot be left out of a reduced prompt; leave the "
                "image and its tokens out of the call, or set budget=1.0"
            )
        packed = reducer.stage.gather_features(adapter, encoding, images, selections)
        masks = [s.packed_mask().to(image.device) for s, image in zip(selections, images, strict=True)]
        places = [entering_places(*pair) for pair in zip(selections, masks, strict=True)]
        features = adapter.features_to_inputs(encoding, packed, places)
        if not adapter.in_prompt:
            rows = Rows.unchanged(mask)
            self._record(selections, mask, rows, second_look_flops)
            return PreparedCall({**text, **features.inputs}, rows, selections, contexts=self._contexts(features))
        preserve = reducer.positions == "preserve"
        # Without a cache, transformers takes gaps in position ids for packed sequences unless a position is masked.
        spare = int(generating and preserve and not cached)
        kept = torch.cat(masks)
        side = adapter.text_separator_side if reducer.text_separators == "drop_empty" else "none"
        emptied = emptied_text(placeholders, kept, lengths, side)
        padding = "left" if spare else padding_side(mask, inputs.get("labels") is not None)
        rows = shorter_rows(placeholders, mask, kept, padding, spare, emptied)
        short = shorten(text, rows, self._pad_token_id())
        short.pop("position_ids", None)
        if (positions := self._positions(inputs, rows, generating)) is not None:
            short["position_ids"] = positions
        self._record(selections, mask, rows, second_look_flops)
        return PreparedCall({**short, **features.inputs}, rows, selections, True, self._contexts(features))

    def _keep_everything(
        self,
        inputs: dict[str, Any],
        text: dict[str, Any],
        encoding: Encoding,
        is_shared: bool,
        selections: list[Selection],
        mask: Tensor,
        generating: bool,
        second_look_flops: int,
    ) -> PreparedCall:
        """Return the call as it came in: the output object must equal that of the unmodified model."""
        rows = Rows.unchanged(mask)
        self._record(selections, mask, rows, second_look_flops)
        if not (encoding.complete or is_shared):
            return PreparedCall(inputs, rows, selections)  # the model encodes the images by itself
        if self.adapter.vision_positions and inputs.get("position_ids") is None:
            text["position_ids"] = self.adapter.positions({**encoding.inputs, **inputs}, generating)
        if encoding.complete:
            features = self.adapter.complete_inputs(encoding)
        else:
            features = self.adapter.features_to_inputs(encoding, encoding.packed)
        return PreparedCall({**text, **features.inputs}, rows, selections, contexts=self._contexts(features))

    def _contexts(self, features: FeatureInputs) -> tuple[AbstractContextManager[Any], ...]:
        return () if features.context is None else (self._lock, features.context)

    def _record(self, selections: list[Selection], mask: Tensor, rows: Rows, second_look_flops: int) -> None:
        lengths = zip(_row_lengths(mask), _row_lengths(rows.mask), strict=True)
        self.run.add(selections, rows, list(lengths), second_look_flops)

    def _check_without_images(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a call without images whose cache holds a reduced prompt, or that has videos only.

        Raises:
            ValueError: if the ids contain image placeholders that the cache does not hold.
            NotImplementedError: if the call has videos only.
        """
        if self.adapter.has_only_videos(inputs):
            raise NotImplementedError(
                f"{type(self.reducer).__name__} is attached, but videos are not reduced, and this call has videos and "
                f"no image ({self.adapter.video_pixels} without {self.adapter.pixels}); run it outside the block"
            )
        ids = inputs.get("input_ids")
        if ids is None or reduced_cache(inputs) is None:
            return
        if bool((ids == self.adapter.image_token_id).any()):
            raise ValueError(
                "this continues a conversation from a cache that holds a reduced prompt, but the ids are those of the "
                "full one. Generate from the whole conversation, with its images and without past_key_values"
            )

    def check_forward(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a plain call without images that continues a reduced prompt with a mask of the full one.

        Args:
            inputs: keyword inputs of `forward`.

        Raises:
            ValueError: if the attention mask is longer than the cache and the new tokens.
            NotImplementedError: if the call has videos only.
        """
        self._check_without_images(inputs)
        mask, cache = inputs.get("attention_mask"), reduced_cache(inputs)
        tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if cache is None or tokens is None or not isinstance(mask, Tensor):
            return
        stored = int(cache.get_seq_length())
        if mask.dim() == 2 and mask.shape[1] > stored + tokens.shape[1] and self.adapter.in_prompt:
            raise ValueError(
                f"the attention_mask has {mask.shape[1]} positions, but the cache holds {stored} of a reduced prompt "
                f"and the call adds {tokens.shape[1]}; shorten the part of the prompt with "
                "tokenprune.align(attention_mask, run.rows), or use generate"
            )

    def _positions(self, inputs: Mapping[str, Any], rows: Rows, generating: bool) -> Tensor | None:
        """Return the position ids of the reduced prompt; None if `generate` counts them."""
        if self.reducer.positions == "reindex":
            return None if generating else self.adapter.counted_positions(rows.mask)
        position_ids = inputs.get("position_ids")
        full = self.adapter.positions(inputs, generating) if position_ids is None else torch.as_tensor(position_ids)
        return kept_positions(full.expand(*full.shape[:-2], len(rows.index), -1), rows)

    def _with_attention(self, encoding: Encoding) -> tuple[list[EncodedImage], int]:
        """Return the images with the signal that replaces CLS attention, and the FLOPs of a second model."""
        look, needs = self.reducer.attention, self.reducer.needs
        count = len(encoding.images) // encoding.repeats
        unique = encoding.images[:count]
        if not isinstance(look, SaliencyModel) or not attention_layers(needs):
            return [with_cls_substitute(image, needs, self.signal) for image in unique] * encoding.repeats, 0
        tiles = self.adapter.tiles(encoding.inputs, [image.geometry for image in unique])
        is_set = look.image_mean is not None and look.image_std is not None
        mean, std = (look.image_mean, look.image_std) if is_set else self.adapter.pixel_mean_std()
        images, total = [], 0
        for image, pixels in zip(unique, tiles, strict=True):
            center, spread = (pixels.new_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
            visible, flops = with_saliency(image, look, (pixels.float() * spread + center).clamp(0, 1), needs)
            images.append(visible)
            total += flops
        return images * encoding.repeats, total

    def _with_questions(
        self, images: list[EncodedImage], inputs: Mapping[str, Any], placeholders: Tensor, lengths: list[int]
    ) -> list[EncodedImage]:
        """Return the images with the question of their prompt row, if the strategy reads it.

        Raises:
            ValueError: if there is no question, or not one per row.
        """
        needs = [signal for signal in self.reducer.needs if signal.kind in TEXT_SIGNALS]
        if not needs:
            return images
        row_of = placeholders.nonzero()[:, 0].cpu()
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(dim=0)
        questions = self._questions(inputs, len(placeholders))
        vectors = {
            text: self.adapter.embed_question(text, self.reducer.text_model) for text in dict.fromkeys(questions)
        }
        with_text: dict[tuple[EncodedImage, str], EncodedImage] = {}
        for image, row in zip(images, row_of[starts].tolist(), strict=True):
            text = questions[row]
            if (image, text) not in with_text:
                signals = {
                    (signal.kind, layer): vectors[text][signal.kind]
                    for signal in needs
                    for layer in resolve_layers(signal.layer, image.layers, image.feature_layer)
                }
                with_text[image, text] = image.with_signals(signals)
        return [with_text[i, questions[r]] for i, r in zip(images, row_of[starts].tolist(), strict=True)]

    def _questions(self, inputs: Mapping[str, Any], rows: int) -> list[str]:
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
            questions = self.adapter.read_questions(inputs["input_ids"], inputs.get("attention_mask"), self.tokenizer)
        for row, text in enumerate(questions):
            if not text.strip():
                raise ValueError(
                    f"prompt row {row} holds no question beside its images, and {type(self.reducer).__name__} reads "
                    "it; attach with reducer(model, question=...)"
                )
        return questions

    def _pad_token_id(self) -> int:
        """Return an id for padding; it is masked, so any id except the placeholder's is valid."""
        model = self.adapter.model
        for config in (getattr(model, "generation_config", None), model.config.get_text_config(), model.config):
            pad = getattr(config, "pad_token_id", None)
            if isinstance(pad, int) and pad >= 0 and pad != self.adapter.image_token_id:
                return pad
        return 0 if self.adapter.image_token_id else 1


def mark_caches(values: Any) -> None:
    """Mark the key-value caches among inputs or outputs of a call: they hold a reduced prompt.

    The mark stays on the cache object and its copies, also in a later block.

    Args:
        values: a mapping or a tuple; other values are left alone.
    """
    items = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else ()
    for item in items:
        if isinstance(item, Cache):
            item.holds_reduced_prompt = True  # type: ignore[attr-defined]


def reduced_cache(inputs: Mapping[str, Any]) -> Any:
    """Return the filled key-value cache of a call that holds a reduced prompt; None if there is none.

    Args:
        inputs: keyword inputs of `forward` or `generate`.
    """
    cache: Any = inputs.get("past_key_values") or inputs.get("cache")  # renamed in transformers 5.24
    is_reduced = getattr(cache, "holds_reduced_prompt", False) and cache.get_seq_length() > 0
    return cache if is_reduced else None


def missing_signals(reducer: TokenReducer, adapter: Adapter) -> list[str]:
    """Return the kinds of signals that a strategy needs and a model does not provide.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
    """
    needs = read_from(reducer.needs, attention_source(reducer.attention, adapter.provides))
    return sorted({signal.kind for signal in needs} - adapter.provides)


def lacking(reducer: TokenReducer, adapter: Adapter) -> str | None:
    """Return a sentence about what a strategy needs and a model does not provide; None if nothing is missing.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
    """
    name = type(reducer).__name__
    if missing := missing_signals(reducer, adapter):
        needs = read_from(reducer.needs, attention_source(reducer.attention, adapter.provides))
        return (
            f"{name} needs {', '.join(sorted({signal.kind for signal in needs}))}, but {type(adapter.model).__name__} "
            f"with this vision tower provides {', '.join(sorted(adapter.provides))}; missing: {', '.join(missing)}"
        )
    if reducer.text_model is None and reducer.reads_question:
        return (
            f"{name} reads the question, which takes the text tower that belongs to the vision "
            "tower: set text_model to the CLIP checkpoint that the tower comes from (LLaVA: "
            "'openai/clip-vit-large-patch14-336'; the embedded model: 'mini')"
        )
    return None


def attention_name(reducer: TokenReducer, adapter: Adapter) -> str | None:
    """Return where the attention comes from that a strategy reads as CLS attention; None if it reads none.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
    """
    if not attention_layers(reducer.needs):
        return None
    look = reducer.attention
    return look.name if isinstance(look, SaliencyModel) else attention_source(look, adapter.provides)


def reduce_once(reducer: TokenReducer, images: Sequence[EncodedImage]) -> list[Selection]:
    """Return the selection of each image; an image that is listed several times is reduced once.

    Args:
        reducer: the strategy.
        images: the encoded images.
    """
    selections = {image: reducer.reduce(image) for image in dict.fromkeys(images)}
    return [selections[image] for image in images]


def call_generate(model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    """Generate with a model as it is: unmodified for a baseline, or with an attached strategy.

    Args:
        model: the model.
        inputs: keyword arguments of `generate`.
        options: more of them.
    """
    return model.generate(**inputs, **options)


@contextmanager
def counted_encodes(adapter: Adapter) -> Iterator[list[int]]:
    """Count the passes through the vision tower inside the block.

    Args:
        adapter: the adapter of the model.

    Yields:
        A list of one number, the passes so far; it stays 0 if the adapter has no `tower`.
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


def inferred_mask(ids: Tensor, inputs: Mapping[str, Any], config: Any, default: Any) -> Tensor | None:
    """Return the attention mask that `generate` infers from padding, `[rows, length]`; None if it infers none.

    As in transformers: positions with the pad token are masked, if it differs from every end token.

    Args:
        ids: prompts, `[rows, length]`.
        inputs: keyword arguments of `generate`; ``pad_token_id`` and ``eos_token_id`` have precedence.
        config: the generation config of the call.
        default: that of the model.
    """
    pad, eos = (
        next((v for v in (inputs.get(n), getattr(config, n, None), getattr(default, n, None)) if v is not None), None)
        for n in ("pad_token_id", "eos_token_id")
    )
    ends = torch.as_tensor([] if eos is None else eos).flatten().tolist()
    if pad is None or int(pad) in ends or not bool((ids == int(pad)).any()):
        return None
    return (ids != int(pad)).long()


def _row_lengths(mask: Tensor) -> list[int]:
    lengths: list[int] = mask.bool().sum(dim=1).tolist()
    return lengths
