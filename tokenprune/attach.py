"""Attaches a strategy to a live transformers model for the length of a `with` block: the only code that touches one.

Two things are put on the model and taken off again: a forward pre-hook, for plain calls (scoring, training), and an
instance attribute `generate`, which reduces the prompt first and then calls the model's own. The model's code, weights
and config stay as they are. Features reach the model through transformers' `mm_encoder_outputs`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.account import TokenAccount
from tokenprune.adapter import Adapter, Encoding, find_adapter
from tokenprune.budget import as_budget
from tokenprune.image import SEPARATOR, TEXT_SIGNALS, EncodedImage
from tokenprune.layers import resolve_layers
from tokenprune.reducer import ImageReducer
from tokenprune.rewrite import Rows, emptied_text, kept_positions, padding_side, shorten, shorter_rows
from tokenprune.saliency import SecondLook, attention_layers, attention_source, read_from, seen_by, standing_in
from tokenprune.selection import Selection

if TYPE_CHECKING:
    from tokenprune.reducer import TokenReducer

PICTURES = 8
"""Selections of so many images (the first ones of a run) keep the pixels for drawing."""


class Run:
    """What happened inside the block.

    Args:
        reducer: the attached strategy.
        adapter: the adapter of the model.
        question: the question of all prompts, or one per prompt row; None reads it from the prompt.
        tokenizer: reads the prompt; None takes that of the model's own folder or hub id.
    """

    def __init__(
        self,
        reducer: TokenReducer,
        adapter: Adapter,
        question: str | Sequence[str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.reducer = reducer
        self.adapter = adapter
        self.question = question
        self.tokenizer = tokenizer
        self.attention = attention_source(reducer.attention, adapter.provides)
        """The kind of signal that the strategy is given as CLS attention, if it reads any; or ``"second_look"``."""
        self.needs = read_from(reducer.needs, self.attention)
        """The signals that are captured for the strategy."""
        self.selections: list[Selection] = []
        """One selection per image, in the order seen."""
        self.account = TokenAccount(adapter.llm, attention=self.attention_read)
        """Tokens, cache bytes and FLOPs of everything seen."""

    @property
    def attention_read(self) -> str | None:
        """Where the attention comes from that the strategy reads as CLS attention; None if it reads none."""
        if not attention_layers(self.reducer.needs):
            return None
        look = self.reducer.attention
        return look.name if isinstance(look, SecondLook) else self.attention

    @property
    def missing(self) -> list[str]:
        """Kinds of signals that the strategy needs and the model does not give."""
        return sorted({signal.kind for signal in self.needs} - self.adapter.provides)

    def encode(self, inputs: Mapping[str, Any]) -> Encoding:
        """Encode the images of a call once, with the signals that the strategy needs."""
        if self.reducer.stage == "image":
            return self.adapter.unencoded(inputs, self._pictures)
        return self.adapter.encode(inputs, self.needs, self._pictures, self.reducer.text_model)

    @property
    def _pictures(self) -> int:
        return max(0, PICTURES - len(self.selections))

    def _encode_for_one_answer(self, inputs: Mapping[str, Any]) -> Encoding:
        """Encode the images of a call as far as this one strategy at this one budget needs it."""
        if self.reducer.stage == "image" or as_budget(self.reducer.budget).amount == 1.0:
            return self.encode(inputs)
        return self.adapter.encode_staged(inputs, self.needs, self._pictures, self.reducer.text_model)

    def reduced(
        self, inputs: dict[str, Any], generating: bool, encoding: Encoding | None = None, cached: bool = True
    ) -> tuple[dict[str, Any], Rows | None]:
        """Return the inputs of one call with its images reduced.

        Args:
            inputs: keyword inputs of `forward` or `generate`.
            generating: whether they go to `generate`.
            encoding: the encoded images of the call (`encode`), which several strategies and budgets can share; an
                image that stands in several places is reduced once. Left out, the pixels in `inputs` are encoded, and
                only as far as the kept tokens need it.
            cached: whether `generate` will use a key-value cache.

        Returns:
            New inputs, and which prompt positions stayed; None if all did and the prompt is the one that came in.

        Raises:
            ValueError: if the placeholders do not match the images, or the call cannot be reduced.
        """
        encoding = self._encode_for_one_answer(inputs) if encoding is None else encoding
        placeholders = self.adapter.placeholders(inputs)
        lengths = [len(image.geometry.packed) for image in encoding.images]
        if self.adapter.in_prompt and int(placeholders.sum()) != sum(lengths):
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {int(placeholders.sum())}, "
                f"features: {sum(lengths)}; make the inputs with the processor that belongs to the model"
            )
        ready = self._with_attention(encoding)
        images = self._with_questions([ready[id(one)] for one in encoding.images], inputs, placeholders, lengths)
        if encoding.staged:
            encoding.leave_out([self.reducer.paid_tiles(image) for image in self._base_first(encoding, images)])
        chosen = {id(image): self.reducer.reduce(image) for image in {id(i): i for i in images}.values()}
        selections = [chosen[id(image)] for image in images]
        masks = [s.packed_mask().to(image.device) for s, image in zip(selections, images, strict=True)]
        rest = {name: value for name, value in inputs.items() if name not in self.adapter.image_inputs}
        attention_mask = inputs.get("attention_mask")
        mask = placeholders.new_ones(placeholders.shape) if attention_mask is None else attention_mask
        full = _row_lengths(mask)
        if all(selection.everything for selection in selections):
            # The prompt stays exactly as it came: the model must not be able to tell the difference.
            self._enter(selections, full, full)
            if self.reducer.stage == "image":
                encoding = self.adapter.encode(inputs, ())
            if self.adapter.vision_positions and inputs.get("position_ids") is None:
                rest["position_ids"] = self.adapter.positions(inputs, generating)
            return {**rest, **self.adapter.hand_over(encoding, encoding.packed)}, None
        _refuse_what_cannot_be_shortened(inputs, generating)
        if isinstance(self.reducer, ImageReducer):
            packed = self._encoded_anew(self.reducer, encoding, selections)
        else:
            packed = [
                _made(self.adapter, encoding, number, *one)
                for number, one in enumerate(zip(selections, images, masks, encoding.kept(masks), strict=True))
            ]
        places = [_entering(*one) for one in zip(selections, masks, strict=True)]
        if not self.adapter.in_prompt:
            self._enter(selections, full, full)
            return {**rest, **self.adapter.hand_over(encoding, packed, places)}, None
        kept = torch.cat(masks)
        preserve = self.reducer.positions == "preserve"
        # Without a cache, transformers takes gaps in position ids for packed sequences unless something is masked.
        spare = int(generating and preserve and not cached)
        side = padding_side(mask, inputs.get("labels") is not None)
        separators = self.adapter.text_separator_side if self.reducer.text_separators == "drop_empty" else "none"
        emptied = emptied_text(placeholders, kept, lengths, separators)
        rows = shorter_rows(placeholders, mask, kept, "left" if spare else side, spare, emptied)
        short = shorten(rest, rows, self._pad_token_id())
        short.pop("position_ids", None)
        if (positions := self._positions(inputs, rows, generating)) is not None:
            short["position_ids"] = positions
        self._enter(selections, full, _row_lengths(rows.mask))
        return {**short, **self.adapter.hand_over(encoding, packed, places)}, rows

    def _positions(self, inputs: Mapping[str, Any], rows: Rows, generating: bool) -> Tensor | None:
        """Return the position ids of the shorter prompt; None leaves counting to `generate`."""
        if self.reducer.positions == "reindex":
            return None if generating else self.adapter.counted_positions(rows.mask)
        given = inputs.get("position_ids")
        full = self.adapter.positions(inputs, generating) if given is None else torch.as_tensor(given)
        return kept_positions(full.expand(*full.shape[:-2], len(rows.index), -1), rows)

    def _encoded_anew(self, reducer: ImageReducer, encoding: Encoding, selections: list[Selection]) -> list[Tensor]:
        """Return the images at the resolution that an image strategy wants, `[kept, dim]` each."""
        unique = list({id(image): image for image in encoding.images}.values())
        grids = [reducer.token_grid(image.geometry) for image in unique]
        anew = self.adapter.encode_resized(encoding.inputs, grids)
        made = {id(image): (grid, features) for image, grid, features in zip(unique, grids, anew, strict=True)}
        packed = []
        for image, selection in zip(encoding.images, selections, strict=True):
            grid, features = made[id(image)]
            if grid is not None and not selection.kept_separators:
                features = features[image.geometry.resized(grid)[0].packed.to(features.device) != SEPARATOR]
            packed.append(features)
        return packed

    def _with_attention(self, encoding: Encoding) -> dict[int, EncodedImage]:
        """Return the images with what stands in for their CLS attention, by the `id` of the image without it."""
        look, needs = self.reducer.attention, self.reducer.needs
        unique = {id(image): image for image in encoding.images}
        if not isinstance(look, SecondLook) or not attention_layers(needs):
            return {key: standing_in(image, needs, self.attention) for key, image in unique.items()}
        tiles = self.adapter.tiles(encoding.inputs, [image.geometry for image in unique.values()])
        given = None if look.image_mean is None or look.image_std is None else (look.image_mean, look.image_std)
        mean, std = self.adapter.normalisation() if given is None else given
        ready = {}
        for (key, image), pixels in zip(unique.items(), tiles, strict=True):
            centre, spread = (pixels.new_tensor(one, dtype=torch.float32).view(-1, 1, 1) for one in (mean, std))
            pictures = (pixels.float() * spread + centre).clamp(0, 1)
            ready[key], flops = seen_by(image, look, pictures, needs)
            self.account.second_look_flops += flops
        return ready

    def _base_first(self, encoding: Encoding, images: list[EncodedImage]) -> list[EncodedImage]:
        """Return the images that say which tiles are paid for: with base tiles alone, if the strategy reads no more."""
        elsewhere = isinstance(self.reducer.attention, SecondLook) or self.reducer.reads_question
        if not self.reducer.base_tile_alone or elsewhere:
            return images
        return [standing_in(image, self.reducer.needs, self.attention) for image in encoding.base_tiles()]

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
        asked: dict[tuple[int, str], EncodedImage] = {}
        vectors: dict[str, Mapping[str, Tensor]] = {}
        out = []
        for image, row in zip(images, row_of[starts].tolist(), strict=True):
            text = questions[row]
            if text not in vectors:
                vectors[text] = self.adapter.embed_question(text, self.reducer.text_model)
            if (id(image), text) not in asked:
                found = {
                    (signal.kind, layer): vectors[text][signal.kind]
                    for signal in needs
                    for layer in resolve_layers(signal.layer, image.layers, image.feature_layer)
                }
                asked[id(image), text] = image.with_signals(found)
            out.append(asked[id(image), text])
        return out

    def _questions(self, inputs: Mapping[str, Any], rows: int) -> list[str]:
        """Return the question of each prompt row."""
        if self.question is not None:
            given = [self.question] * rows if isinstance(self.question, str) else list(self.question)
            if len(given) != rows:
                raise ValueError(f"{len(given)} questions were given for a batch of {rows} prompts; give one per row")
        elif inputs.get("input_ids") is None:
            raise ValueError(
                f"{type(self.reducer).__name__} reads the question, but inputs_embeds hold no text; "
                "attach with reducer(model, question=...)"
            )
        else:
            given = self.adapter.read_questions(inputs["input_ids"], inputs.get("attention_mask"), self.tokenizer)
        for row, text in enumerate(given):
            if not text.strip():
                raise ValueError(
                    f"prompt row {row} holds no question beside its pictures, and {type(self.reducer).__name__} reads "
                    "it; attach with reducer(model, question=...)"
                )
        return given

    def _enter(self, selections: list[Selection], full: list[int], reduced: list[int]) -> None:
        self.account.add(selections, list(zip(full, reduced, strict=True)))
        self.selections += selections

    def _pad_token_id(self) -> int:
        """Return an id for padding; it is masked, so any id but the placeholder's will do."""
        model = self.adapter.model
        for config in (getattr(model, "generation_config", None), model.config.get_text_config(), model.config):
            pad = getattr(config, "pad_token_id", None)
            if isinstance(pad, int) and pad >= 0 and pad != self.adapter.image_token_id:
                return pad
        return 0 if self.adapter.image_token_id else 1


def _row_lengths(mask: Tensor) -> list[int]:
    lengths: list[int] = mask.bool().sum(dim=1).tolist()
    return lengths


def _entering(selection: Selection, mask: Tensor) -> Tensor:
    """Return which position of the packed image enters the LLM at each place, `[kept]`.

    Args:
        selection: what the strategy answered.
        mask: which positions stay, bool `[length]`.
    """
    places = mask.nonzero()[:, 0]
    if selection.order is not None:
        tokens = selection.geometry.packed.to(mask.device)[places] != SEPARATOR
        places[tokens] = places[tokens][selection.order.to(mask.device)]
    return places


def _made(
    adapter: Adapter,
    encoding: Encoding,
    number: int,
    selection: Selection,
    image: EncodedImage,
    mask: Tensor,
    kept: Tensor,
) -> Tensor:
    """Return what enters the LLM: kept or mixed tokens in the wanted order, newlines in place, `[kept, dim]`.

    Args:
        adapter: the adapter of the model, which can project mixtures.
        encoding: the encoding.
        number: the number of the image in it.
        selection: what the strategy answered.
        image: what it saw.
        mask: which packed positions stay, bool `[length]`.
        kept: their features, `[kept, dim]`.
    """
    if selection.mixing is None and selection.order is None:
        return kept
    places = selection.geometry.packed.to(kept.device)
    anchors = places[mask] != SEPARATOR
    tokens = kept[anchors]
    if selection.mixing is not None:
        mixing = selection.mixing.to(kept.device)
        if selection.before_projector:
            tokens = adapter.project(mix(mixing, projector_sources(image, mixing.shape[1]))).to(kept.dtype)
        else:
            tokens = mix(mixing, selection.geometry.unpack(encoding.packed[number]).flatten(0, 1))
    if selection.order is not None:
        tokens = tokens[selection.order.to(tokens.device)]
    out = kept.clone()
    out[anchors] = tokens
    return out


def mix(mixing: Tensor, sources: Tensor) -> Tensor:
    """Return mixtures of vectors, computed in float32 where the machine sums half precision badly, `[kept, width]`."""
    return (mixing.to(torch.float32) @ sources.float()).to(sources.dtype)


def projector_sources(image: EncodedImage, columns: int) -> Tensor:
    """Return what a mixing matrix before the projector mixes, `[columns, width]`: tokens, then CLS tokens if asked."""
    tokens = image.projector_inputs().flatten(0, 1)
    return tokens if columns == len(tokens) else torch.cat([tokens, image.cls_features("feature")[:, 0]])


def _refuse_what_cannot_be_shortened(inputs: Mapping[str, Any], generating: bool) -> None:
    """Raise for calls whose meaning would silently change on a shorter prompt.

    Raises:
        ValueError: naming the argument and the way out.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("a reduced prompt needs a 2-D attention_mask [rows, length]; leave ready-made masks out")
    if mask is None and positions is not None and bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError(
            "position_ids that restart without an attention_mask mean packed sequences; these cannot be reduced. "
            "Give one sequence per row with an attention_mask"
        )
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise ValueError("logits_to_keep as positions refers to the full prompt; give a number, or select afterwards")
    cache = inputs.get("past_key_values") or inputs.get("cache")  # renamed in transformers 5.24
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "images cannot be added to a filled cache while a reducer is attached: the cache holds shorter prompts "
            "than the ids say. Generate from the whole conversation without past_key_values"
        )
    if generating and inputs.get("negative_prompt_ids") is not None:
        raise ValueError("negative_prompt_ids is not supported below a budget of 100 %")


class _PromptStreamer:
    """Hands a streamer the full prompt instead of the reduced one."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        """Pass tokens on; the first ones are the prompt."""
        self.streamer.put(value if self.prompt is None else self.prompt)
        self.prompt = None

    def end(self) -> None:
        """Pass the end on."""
        self.streamer.end()


class _Generate:
    """The `generate` of a model with a reducer attached: reduce, then call the model's own."""

    def __init__(self, run: Run, original: Any) -> None:
        self.run = run
        self.original = original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model made inside the block is an ordinary model."""
        model = self.run.adapter.model
        return type(model).generate.__get__(memo.get(id(model), model))

    def __call__(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate from the reduced prompt; returned sequences begin with the full one."""
        if inputs is not None and kwargs.get("input_ids") is None:
            kwargs["input_ids"] = inputs
        if not self.run.adapter.has_pictures(kwargs):
            self._refuse_reduced_history(kwargs)
            return self.original(generation_config=generation_config, **kwargs)
        prompt = kwargs.get("input_ids")
        config = self.run.adapter.model.generation_config if generation_config is None else generation_config
        cached = kwargs["use_cache"] if kwargs.get("use_cache") is not None else config.use_cache is not False
        with torch.no_grad():
            reduced, rows = self.run.reduced(kwargs, generating=True, cached=cached)
        if rows is None or prompt is None:  # with inputs_embeds alone, generate returns new tokens only
            return self.original(generation_config=generation_config, **reduced)
        dropped = prompt.shape[1] - rows.index.shape[1]
        reduced, generation_config = self._with_shorter_limits(reduced, generation_config, dropped)
        if reduced.get("streamer") is not None:
            reduced["streamer"] = _PromptStreamer(reduced["streamer"], prompt.cpu())
        output = self.original(generation_config=generation_config, **reduced)
        width = rows.index.shape[1]
        if isinstance(output, Tensor):
            return _with_full_prompt(output, prompt, width)
        output["sequences"] = output.sequences = _with_full_prompt(output.sequences, prompt, width)
        return output

    def _refuse_reduced_history(self, kwargs: Mapping[str, Any]) -> None:
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values") or kwargs.get("cache")
        if cache is None or ids is None or cache.get_seq_length() == 0:
            return
        if bool((ids == self.run.adapter.image_token_id).any()):
            raise ValueError(
                "this continues a conversation from a cache that holds a reduced prompt, but the ids are those of the "
                "full one. Generate from the whole conversation, with its images and without past_key_values"
            )

    def _with_shorter_limits(
        self, kwargs: dict[str, Any], generation_config: Any, dropped: int
    ) -> tuple[dict[str, Any], Any]:
        """Lower total length limits by the dropped width, wherever they are set; `max_new_tokens` needs nothing."""
        limits = ("max_length", "min_length")
        default = self.run.adapter.model.generation_config
        config = default if generation_config is None else generation_config
        lowered = {name: getattr(config, name) - dropped for name in limits if getattr(config, name, None)}
        new_tokens = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
        for name in limits:
            if kwargs.get(name) is not None:
                kwargs[name] -= dropped
                lowered.pop(name, None)
            elif kwargs.get(new_tokens[name], getattr(config, new_tokens[name], None)) is not None:
                lowered.pop(name, None)
        if generation_config is not None and lowered:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**lowered)
        elif lowered:
            kwargs.update(lowered)
        return kwargs, generation_config


def _with_full_prompt(sequences: Tensor, prompt: Tensor, width: int) -> Tensor:
    """Replace the reduced prompt at the head of generated sequences by the full one, `[rows * returned, length]`."""
    repeats = len(sequences) // len(prompt)
    return torch.cat([prompt.to(sequences.device).repeat_interleave(repeats, dim=0), sequences[:, width:]], dim=1)


@contextmanager
def attach(
    model: Any, reducer: TokenReducer, question: str | Sequence[str] | None = None, tokenizer: Any = None
) -> Iterator[Run]:
    """Attach a strategy to a model for the length of a block.

    Args:
        model: a transformers model of a supported family, unmodified.
        reducer: the strategy.
        question: the question of all prompts, or one per prompt row; None reads it from the prompt.
        tokenizer: reads the prompt; None takes that of the model's own folder or hub id.

    Yields:
        The run: selections and account of everything that goes through the model.

    Raises:
        TypeError: if no adapter knows the model.
        ValueError: if the adapter does not provide a signal that the strategy needs.
        RuntimeError: if the model has a reducer already, or if the block ends and no image was ever reduced.
    """
    before = model.__dict__.get("generate") if hasattr(model, "__dict__") else None
    if isinstance(before, _Generate):
        raise RuntimeError(
            f"{type(before.run.reducer).__name__} is attached to this model already; two reducers on one model would "
            "be a `Composed` strategy, which does not exist yet. Leave the first block before you enter the next"
        )
    adapter = find_adapter(model)
    run = Run(reducer, adapter, question, tokenizer)
    needed = sorted({signal.kind for signal in run.needs})
    if run.missing:
        raise ValueError(
            f"{type(reducer).__name__} needs {', '.join(needed)}, but {type(model).__name__} with this vision tower "
            f"provides {', '.join(sorted(adapter.provides))}; missing: {', '.join(run.missing)}"
        )
    if reducer.text_model is None and reducer.reads_question:
        raise ValueError(
            f"{type(reducer).__name__} reads the question, which takes the text tower that belongs to the vision "
            "tower: set text_model to the CLIP checkpoint that the tower comes from (LLaVA: "
            "'openai/clip-vit-large-patch14-336'; the embedded model: 'mini')"
        )
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def reduce_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any] | None:
        """Reduce a plain forward call. Decoding steps, text-only calls and copies of the model pass."""
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if module is not model or not adapter.has_pictures(inputs):
            return None
        return (), run.reduced(inputs, generating=False)[0]

    hook = model.register_forward_pre_hook(reduce_call, with_kwargs=True)
    try:
        if hasattr(model, "generate"):
            model.generate = _Generate(run, model.generate)
        with adapter.attached():
            yield run
    finally:
        hook.remove()
        if before is not None:
            model.generate = before
        else:
            model.__dict__.pop("generate", None)
    if not run.selections:
        raise RuntimeError(
            f"{type(reducer).__name__} was attached, but no image went through the model inside the block, so nothing "
            f"was reduced. Call model.generate(...) or model(...) with {adapter.pixels} inside the `with` block"
        )
