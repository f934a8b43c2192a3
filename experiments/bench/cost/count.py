"""Counts the work of each phase of a model on the meta device, from the image to the second new token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenprune.adapter import find_adapter
from tokenprune.budget import Budget, as_budget
from tokenprune.caches import find_cache, name_cache_argument
from tokenprune.capabilities import HasDecoder, require_capability
from tokenprune.checks import defer_checks
from tokenprune.cuts import Cut, as_entered_budget, resolve_cuts
from tokenprune.decoder.narrow_layers import CutStep, NarrowLayers
from tokenprune.decoder.placement import Entries
from tokenprune.decoder.trace import LayerTrace
from tokenprune.encoder.tokens import restrict_images, select_remaining, widen_selections
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.experiments.bench.cost.meter import Meter, Work
from tokenprune.experiments.bench.image_processors import build_image_processor
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.models._base.tiled import TiledAdapter
from tokenprune.packing import KeptPositions
from tokenprune.requirements import describe_missing_signals, describe_missing_steps
from tokenprune.selection import Selection
from tokenprune.strategies import UniformStride


@dataclass(frozen=True)
class Tokens:
    """Token counts of one prompt row.

    Args:
        encoded: output tokens of the tower, including padding.
        full: visual tokens and newline tokens of the full prompt.
        kept: visual tokens that enter the LLM.
        newlines: newline tokens that enter the LLM.
        text: remaining tokens of the prompt.
    """

    encoded: int
    full: int
    kept: int
    newlines: int
    text: int

    @property
    def prompt(self) -> int:
        """Length of the prompt that enters the LLM."""
        return self.kept + self.newlines + self.text


@dataclass(frozen=True)
class BatchCost:
    """BatchCost work and memory of one batch.

    Args:
        batch: number of prompts, with one image each.
        budget: budget of visual tokens; None keeps all.
        tokens: token counts of each prompt.
        weight_bytes: bytes of all parameters and buffers.
        kv_bytes: bytes of the key-value cache after prefill.
        token_kv_bytes: bytes by which the cache grows with each new token of every prompt.
        encode: work of the tower and the projector.
        prefill: work of the LLM for the prompt, up to the first new token.
        decode: work of the LLM for one further token.
        tower_flops: FLOPs of the vision tower, a part of ``encode``. If the tower contains the projector, these are all
            FLOPs of ``encode``.
        cuts: the cuts inside the LLM.
        tower: the strategy inside the vision tower; None if all patches remain.
    """

    batch: int
    budget: Budget | None
    tokens: Tokens
    weight_bytes: int
    kv_bytes: int
    token_kv_bytes: int
    encode: Work
    prefill: Work
    decode: Work
    tower_flops: int
    cuts: tuple[Cut, ...] = ()
    tower: EncoderReducer | None = None

    @property
    def phases(self) -> dict[str, Work]:
        """The phases by name."""
        return {"encode": self.encode, "prefill": self.prefill, "decode_step": self.decode}

    def peak_bytes(self, new_tokens: int) -> int:
        """Return the peak memory in bytes.

        Args:
            new_tokens: number of new tokens; the cache grows by all of them except the last.
        """
        growth = self.token_kv_bytes * (new_tokens - 1)
        phases = (self.encode.peak_bytes, self.prefill.peak_bytes, self.decode.peak_bytes + growth)
        return self.weight_bytes + max(phases)


def process_image(adapter: PlaceholderAdapter, image_size: tuple[int, int]) -> tuple[dict[str, Tensor], TileGeometry]:
    """Return the vision inputs of one image, from the image processor of the family, and the layout of its tiles.

    Args:
        adapter: an adapter of the family.
        image_size: height x width of the image in pixels.

    Raises:
        ValueError: if `build_image_processor` does not support the family.
    """
    # Not uniform, because adapters may infer the grid of an image from its pixel values.
    small = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    image = Image.fromarray(small).resize((image_size[1], image_size[0]))
    processed = build_image_processor(adapter.model.config)(images=[image], return_tensors="pt")
    inputs = {name: value for name, value in processed.items() if name in adapter.image_inputs}
    prompt = dict(inputs)
    if isinstance(adapter, TiledAdapter):  # this adapter assigns tiles to images by reading the prompt
        length = len(inputs[adapter.pixels]) * adapter.token_grid[0] * adapter.token_grid[1]
        prompt["input_ids"] = torch.full((1, length), adapter.image_token_id)
    (layout,) = adapter.layouts(prompt)
    return inputs, layout


def select_evenly(layout: TileGeometry, budget: int | float | str | Budget, newlines: Any) -> Selection:
    """Return a selection of evenly spaced tokens, as a substitute for the selection of a method.

    Args:
        layout: the layout of the image.
        budget: budget of visual tokens.
        newlines: rule for newline tokens, as in `TokenReducer.newlines`.
    """
    image = EncodedImage(geometry=layout, features=torch.zeros(layout.tiles, layout.tokens, 1))
    return UniformStride(budget, newlines=newlines).reduce(image)


def select_after_tower(
    layout: TileGeometry, patches: int, budget: int | float | str | Budget | None, newlines: Any
) -> Selection:
    """Return a selection of evenly spaced tokens among evenly spaced patches that remain in the tower.

    Args:
        layout: the layout of the image; a token is one patch.
        patches: number of patches of a tile that remain.
        budget: budget of visual tokens; a ratio refers to all tokens. None keeps all tokens that remain.
        newlines: rule for newline tokens, as in `TokenReducer.newlines`.
    """
    kept = torch.zeros(layout.tiles, layout.tokens, dtype=torch.bool)
    kept[:, torch.arange(patches) * layout.tokens // patches] = True
    images = [EncodedImage(geometry=layout, features=torch.zeros(layout.tiles, layout.tokens, 1))]
    if budget is None:
        return select_remaining(images, [kept], newlines)[0]
    (restricted,) = restrict_images(images, [kept])
    selection = UniformStride(budget, newlines=newlines).reduce(restricted)
    return widen_selections([selection], images, newlines)[0]


def count_tokens(layout: TileGeometry, selection: Selection | None, text: int) -> Tokens:
    """Return the token counts of a prompt with one image.

    Args:
        layout: the layout of the image.
        selection: the kept tokens; None keeps all.
        text: number of text tokens in the prompt.
    """
    encoded, full = layout.tiles * layout.tokens, len(layout.packed)
    if selection is None:
        return Tokens(encoded, full, full - layout.newlines, layout.newlines, text)
    return Tokens(encoded, full, selection.kept_tokens, selection.kept_newlines, text)


def _build_meta_pixels(pixels: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """Return the pixels of a batch on the meta device."""
    return torch.empty(batch * pixels.shape[0], *pixels.shape[1:], dtype=dtype, device="meta")


def encode_images(
    adapter: PlaceholderAdapter,
    inputs: Mapping[str, Any],
    layout: TileGeometry,
    batch: int,
    selection: Selection | None,
) -> Any:
    """Encode the images like a reducer that reads no signals, or like the plain model if there is no selection.

    Args:
        adapter: the adapter of the model.
        inputs: the vision inputs of the batch.
        layout: the layout of each image.
        batch: number of images.
        selection: the kept tokens of each image; None keeps all.
    """
    if selection is None or selection.is_identity or not adapter.can_leave_early(inputs, ()):
        return adapter.model.base_model.get_image_features(**inputs, return_dict=True)
    tokens = adapter.run_tower(inputs, [layout] * batch, {}).tokens
    return tokens.gather(KeptPositions.from_selections([selection] * batch))


def encode_with_reduction(
    adapter: PlaceholderAdapter,
    inputs: Mapping[str, Any],
    layout: TileGeometry,
    batch: int,
    reducer: EncoderReducer,
    select: Callable[[int | None], Selection | None],
) -> tuple[Any, Selection | None]:
    """Encode the images with a strategy inside the tower; returns their features and the selection of each image.

    Args:
        adapter: the adapter of the model.
        inputs: the vision inputs of the batch.
        layout: the layout of each image.
        batch: number of images.
        reducer: the strategy inside the tower.
        select: returns the selection for a number of remaining patches of a tile; None if all tokens remain.

    Raises:
        ValueError: if the tower runs over all images as one sequence.
    """
    layouts = [layout] * batch
    if adapter.one_sequence:
        raise ValueError(
            f"the FLOPs of {reducer.label} in the vision tower of {adapter.family} depend on the positions of the kept "
            "patches, because attention runs in parts of one sequence; measure them with `tokenprune bench run`"
        )
    patches = adapter.build_patch_reduction([reducer], layouts, adapter.feature_layer(inputs))
    if patches is None:
        selection = select(None)
        return encode_images(adapter, inputs, layout, batch, selection), selection
    with defer_checks():  # tensors on the meta device have no values to check
        if adapter.can_leave_early(inputs, ()):
            run = adapter.run_tower(inputs, layouts, {}, patches)
        else:
            run = adapter.run_vision_side(inputs, layouts, {}, True, patches)
    record = adapter.read_patch_record(patches, layouts, inputs)
    selection = select(None if record.kept is None else patches.passes[-1].number)
    if selection is None:
        return run.tokens.all(), None
    return run.tokens.gather(KeptPositions.from_selections([selection] * batch)), selection


class MetaPlan:
    """The cuts of a prompt on the meta device: layers behind a cut run on the tokens that would remain.

    Args:
        adapter: the adapter of the model.
        layout: the layout of the image.
        selection: the tokens that enter the LLM; None if all enter.
        tokens: the token counts of the prompt.
        batch: number of prompts.
        cuts: the cuts.
    """

    def __init__(
        self,
        adapter: PlaceholderAdapter,
        layout: TileGeometry,
        selection: Selection | None,
        tokens: Tokens,
        batch: int,
        cuts: Sequence[Cut],
    ) -> None:
        self.traces: dict[int, LayerTrace] = {}
        self._layers: NarrowLayers | None = None
        self._batch, self._lengths = batch, [tokens.prompt]
        """Number of tokens of each prompt before the first cut and behind each cut."""
        if not cuts:
            return
        modules = require_capability(adapter, HasDecoder).decoder_modules
        resolved = resolve_cuts(cuts, len(modules.layers))
        self._layers = NarrowLayers(modules, list(resolved))
        entered = layout if selection is None else replace(layout.restrict(selection.packed_mask()), entered=None)
        for cut in resolved.values():
            asked = as_entered_budget(cut.budget).asked(entered)
            kept = select_evenly(entered, Budget(min(asked, entered.valid_tokens)), "keep_rows")
            dropped = len(entered.packed) - kept.kept_tokens - kept.kept_newlines
            self._lengths.append(tokens.prompt - dropped)

    def run(self) -> AbstractContextManager[None]:
        """Return a context in which the LLM runs with the cuts."""
        return nullcontext() if self._layers is None else self._layers.run(self)

    def find_step(
        self, cut: int, hidden: Tensor, args: Any, kwargs: Any, count_stored: Callable[[], int]
    ) -> CutStep | None:
        """Return the step of the prefill behind a cut."""
        length, width = hidden.shape[1], self._lengths[cut + 1]

        def table(size: int) -> Tensor:
            return torch.zeros(self._batch, size, dtype=torch.long, device="meta")

        return CutStep(Entries(table(width), None, table(length), table(1)[:, 0]))

    def is_wide(self, layer: int) -> bool:
        """Return whether the output of a layer has the width of the prompt."""
        return False


def count_batch(
    model: Any,
    image_size: tuple[int, int],
    budget: int | float | str | Budget | None = None,
    batch: int = 1,
    text_tokens: int = 60,
    newlines: Any = "keep_rows",
    all_logits: bool = False,
    encode_all: bool = False,
    cuts: Sequence[Cut] = (),
    tower: EncoderReducer | None = None,
) -> BatchCost:
    """Count the work and memory of one batch: encode, prefill and one decode step.

    Args:
        model: a model on the meta device.
        image_size: height x width of the images in pixels.
        budget: budget of visual tokens; None keeps all.
        batch: number of prompts, with one image of that size each.
        text_tokens: text tokens of each prompt.
        newlines: rule for newline tokens, as in `TokenReducer.newlines`.
        all_logits: whether to compute logits for the complete prompt in float32, as transformers did before 4.45. By
            default only the last token has logits.
        encode_all: whether to encode images completely before the selection, as published code does.
        cuts: cuts inside the LLM; ratios refer to the tokens that entered it.
        tower: strategy inside the vision tower; its own work, such as matching, is counted as well.

    Raises:
        TypeError: if no adapter supports the model, or if its adapter has no image layouts.
        ValueError: if `build_image_processor` does not support the family, or the tower does not support the strategy.
    """
    adapter = find_adapter(model)
    if not isinstance(adapter, PlaceholderAdapter):
        raise TypeError(
            f"the cost of {adapter.family} cannot be counted: {type(adapter).__name__} has no image layouts"
        )
    inputs, layout = process_image(adapter, image_size)
    if tower is not None and (
        message := describe_missing_steps(tower, adapter) or describe_missing_signals(tower, adapter)
    ):
        raise ValueError(message)
    dim, meter, dtype = model.config.get_text_config().hidden_size, Meter(), model.dtype

    def select(patches: int | None) -> Selection | None:
        if patches is not None:
            return select_after_tower(layout, patches, budget, newlines)
        return None if budget is None else select_evenly(layout, budget, newlines)

    def run_llm(length: int, start: int, cache: Any) -> Any:
        embeds = torch.empty(batch, length, dim, dtype=dtype, device="meta")
        positions = torch.arange(start, start + length, device="meta").expand(batch, -1)
        positions = positions.expand(3, -1, -1) if adapter.has_vision_positions else positions
        out = model(
            inputs_embeds=embeds,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
            **{name_cache_argument(model): cache},
        )
        return find_cache(out), out.logits.float()

    with torch.inference_mode():
        with meter.phase() as encoding:
            # Size tensors stay on the CPU, because layouts need their values.
            batch_inputs = {
                name: _build_meta_pixels(value, batch, dtype) if name == adapter.pixels else torch.cat([value] * batch)
                for name, value in inputs.items()
            }
            if tower is None:
                selection = select(None)
                encoded = encode_images(adapter, batch_inputs, layout, batch, None if encode_all else selection)
            else:
                encoded, selection = encode_with_reduction(adapter, batch_inputs, layout, batch, tower, select)
        tokens = count_tokens(layout, selection, text_tokens)
        plan = MetaPlan(adapter, layout, selection, tokens, batch, cuts)
        with meter.phase() as prefill, plan.run():
            cache, logits = run_llm(tokens.prompt, 0, None)
        stored = [(layer.keys.shape[2], layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers]
        kv_bytes = sum(size for _, size in stored)
        del encoded, logits, batch_inputs
        with meter.phase() as decode, plan.run():
            run_llm(1, tokens.prompt, cache)
    projected = 0 if adapter.projector_path is None else encoding.modules.get(type(adapter.projector).__name__, 0)
    weights = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return BatchCost(
        batch=batch,
        budget=None if budget is None else as_budget(budget),
        tokens=tokens,
        weight_bytes=sum(weights.values()),
        kv_bytes=kv_bytes,
        token_kv_bytes=sum(size // length for length, size in stored),
        encode=encoding,
        prefill=prefill,
        decode=decode,
        tower_flops=encoding.flops - projected,
        cuts=tuple(cuts),
        tower=tower,
    )
