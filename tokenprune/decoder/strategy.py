"""A strategy bound to the layers of a live LLM: it selects tokens at each cut."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import Adapter
from tokenprune.batch import BatchSelection, BatchSelector
from tokenprune.capabilities import DecoderModules, HasDecoder, require_capability
from tokenprune.cuts import as_entered_budget, resolve_cuts
from tokenprune.decoder.narrow_layers import NarrowLayers
from tokenprune.decoder.plan import CutContext, DecoderPlan
from tokenprune.decoder.prompt import CutView, PromptLayout
from tokenprune.decoder.trace import LayerTrace
from tokenprune.decoder.views import SignalSource, build_views
from tokenprune.geometry import TileGeometry
from tokenprune.image import (
    ASKED_SIGNALS,
    LLM_HIDDEN_SIGNALS,
    LLM_SIGNALS,
    LLM_TEXT_SIGNALS,
    NORMED_SIGNALS,
    TEXT_ROW_SIGNALS,
    EncodedImage,
    Signal,
    SignalKey,
)
from tokenprune.prepared_call import PreparedCall

if TYPE_CHECKING:
    from tokenprune.decoder_reducer import DecoderReducer


class BoundDecoderReducer:
    """A strategy inside the LLM, bound to the layers of a model.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.

    Raises:
        ValueError: if a cut is not inside the LLM, cuts do not ascend, or positions cannot be counted anew.
    """

    def __init__(self, reducer: DecoderReducer, adapter: Adapter) -> None:
        self.reducer, self.model, self._llm = reducer, adapter.model, adapter.llm
        if not adapter.has_prompt_tokens:
            raise NotImplementedError(
                f"{type(adapter.model).__name__} reads images by cross-attention and has no image tokens inside its "
                f"LLM, so {reducer.label} cannot drop them there; use a strategy of the projector stage, such as HiRED"
            )
        decoder = require_capability(adapter, HasDecoder)
        self.modules = decoder.decoder_modules
        count = len(self.modules.layers)
        self._cuts = resolve_cuts(reducer.cuts, count)
        self.cuts = tuple(self._cuts)
        """The first layer of each cut."""
        reindexes = reducer.positions == "reindex"
        if reindexes and adapter.has_vision_positions:
            raise ValueError(
                f'positions="reindex" would remove the place of a token in its image from the positions of '
                f'{type(adapter.model).__name__} (M-RoPE); set positions="preserve"'
            )
        reducers = [reducer.at_cut(cut) for cut in self._cuts.values()]
        self._selectors = [BatchSelector(part) for part in reducers]
        self._readers = [
            SignalReaders.from_needs(part.needs, layer, self.modules)
            for part, layer in zip(reducers, self.cuts, strict=True)
        ]
        kinds: dict[int, frozenset[str]] = {}
        for reader in self._readers:
            for layer, names in reader.kinds_by_layer.items():
                kinds[layer] = kinds.get(layer, frozenset()) | names
        self._decoder = decoder
        tracer = decoder.trace_layers(kinds) if kinds else None
        self.layers = NarrowLayers(self.modules, self.cuts, reindexes, tracer)
        """The hooks of the layers."""
        self.reads_text = any(reader.reads_text for reader in self._readers)
        """Whether the strategy reads the text after an image."""

    def keeps_all(self, layouts: Sequence[TileGeometry]) -> bool:
        """Return whether the budget of every cut grants all tokens of every image.

        Args:
            layouts: the layout of each image.
        """
        budgets = [as_entered_budget(cut.budget) for cut in self._cuts.values()]
        return all(budget.asked(layout) >= layout.valid_tokens for budget in budgets for layout in layouts)

    def add_to_call(
        self,
        call: PreparedCall,
        prompt: PromptLayout,
        images: Sequence[EncodedImage],
        inputs: Mapping[str, Any],
        record: Callable[[DecoderPlan], None],
    ) -> PreparedCall:
        """Return a call that drops tokens at the cuts.

        Args:
            call: the call with the tokens that enter the LLM.
            prompt: the positions of its prompt, without labels.
            images: the encoded images.
            inputs: the inputs of the caller.
            record: records the plan after the call.
        """
        labels = call.inputs.get("labels")
        if labels is not None:  # the plan masks the labels of dropped tokens
            labels = labels.clone()
            call = replace(call, inputs={**call.inputs, "labels": labels})
            prompt = replace(prompt, labels=labels)
        build_plan = partial(DecoderPlan, prompt, self, images, self._count_wide_layers(inputs))
        return replace(call, contexts=(*call.contexts, CutContext(self.layers, build_plan, record)))

    def _count_wide_layers(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of first layers whose inputs have the width of the prompt."""
        configs = (
            self.model.config,
            self.model.config.get_text_config(),
            getattr(self.model, "generation_config", None),
        )
        sources = (*configs, inputs.get("generation_config"))
        options = (inputs.get("output_hidden_states"), *(getattr(s, "output_hidden_states", None) for s in sources))
        return len(self.modules.layers) if any(options) else self.modules.adds_features_until

    def hold(self) -> AbstractContextManager[None]:
        """Return a context that keeps the hooks on the layers."""
        return self.layers.hold()

    def select(self, cut: int, view: CutView) -> BatchSelection:
        """Return the selections of all images at a cut.

        Args:
            cut: number of the cut.
            view: the tokens at the cut.
        """
        reader, layer = self._readers[cut], self.cuts[cut]
        sources: dict[SignalKey, SignalSource] = {}
        for index, kinds in reader.kinds_by_layer.items():
            source = view.locate(view.traces[index].take_rows(view.repeats), index, self.reads_text)
            sources |= dict.fromkeys(((kind, index) for kind in sorted(kinds)), source)
        if reader.asked:
            sources |= self._ask(cut, view)
        if reader.normed:
            trace = LayerTrace(self._normalize(view.hidden))
            # Hidden states have the width of the prompt, as the inputs of layer 0.
            sources |= dict.fromkeys(((kind, layer) for kind in reader.normed), view.locate(trace, 0, self.reads_text))
        entering = SignalSource(LayerTrace(view.hidden), view.locate(LayerTrace(), 0, False).images, view.prompt.last)
        before = self.modules.layer_before(layer) if reader.kinds_by_layer else 0
        views = build_views(view.layouts, entering, sources, len(self.modules.layers), layer, before, view.images)
        return self._selectors[cut].select(views)

    def count_signal_flops(self, plan: DecoderPlan) -> int:
        """Return the FLOPs of the signals of the LLM in a call, for real tokens: captured rows and asking.

        Args:
            plan: the plan after the first forward pass.
        """
        lengths, rows, total = [plan.prompt.tokens, *plan.lengths], plan.prompt.row_of_image, 0
        for cut, (layer, reader) in enumerate(zip(self.cuts, self._readers, strict=True)):
            visual = [selection.geometry.valid_tokens for selection in plan.selections[cut]]
            text = [len(part) for part in plan.prompt.text] if self.reads_text else [0] * len(visual)
            for index, kinds in reader.kinds_by_layer.items():
                keys = lengths[bisect_right(self.cuts, index)]
                total += sum(self._count_row_flops(kind, keys, rows, visual, text) for kind in kinds)
            weights = count_projection_weights(self.modules, layer) if reader.asked else 0
            total += 2 * weights * sum(lengths[cut]) * len({kind != "unrotated_attention" for kind in reader.asked})
            total += sum(self._count_row_flops(kind, lengths[cut], rows, visual, text) for kind in reader.asked)
        return total

    def _count_row_flops(
        self, kind: str, keys: Sequence[int], rows: Sequence[int], visual: Sequence[int], text: Sequence[int]
    ) -> int:
        """Return the FLOPs of attention rows of a kind of signal; 0 for signals without rows.

        Args:
            kind: the kind of the signal.
            keys: number of keys of each prompt row.
            rows: the prompt row of each image.
            visual: visual tokens of each image.
            text: text tokens after each image.
        """
        row, images = 2 * self._llm.heads * self._llm.head_dim, range(len(rows))
        if kind in ("last_text_attention", "asked_last_attention", "unrotated_attention"):
            return row * sum(keys)
        if kind in ("text_attention", "asked_text_attention"):
            return row * sum(text[image] * keys[rows[image]] for image in images)
        if kind in ("visual_attention", "asked_visual_attention"):
            return row * sum(visual[image] * keys[rows[image]] for image in images)
        if kind == "rotary_similarity":
            return 4 * self._llm.head_dim * sum(text[image] * visual[image] for image in images)
        return 0

    def _normalize(self, hidden: Tensor) -> Tensor:
        """Return hidden states after the final norm of the LLM, `[rows, length, dim]`."""
        norm = self.modules.norm
        return hidden if norm is None else torch.as_tensor(norm(hidden))

    def _ask(self, cut: int, view: CutView) -> dict[SignalKey, SignalSource]:
        """Return the sources of signals that the layer of a cut computes on all tokens that are left."""
        layer, asked = self.cuts[cut], self._readers[cut].asked
        args, kwargs = view.layer_inputs
        sources = {
            is_rotated: view.locate(self._decoder.ask_layer(layer, args, kwargs, is_rotated), layer, self.reads_text)
            for is_rotated in {kind != "unrotated_attention" for kind in asked}
        }
        return {(kind, layer): sources[kind != "unrotated_attention"] for kind in sorted(asked)}


OUTPUT_MAPS = ("o_proj", "out_proj", "dense")
"""Names of the output map of an attention module."""


def count_projection_weights(modules: DecoderModules, layer: int) -> int:
    """Return the number of weights of the query, key and value maps of a decoder layer.

    Args:
        modules: the modules of the LLM.
        layer: index of the layer.
    """
    attention: nn.Module = getattr(modules.layers[layer], modules.attention)
    maps = (part for name, part in attention.named_children() if name not in OUTPUT_MAPS)
    return sum(map(modules.count_weights, maps))


@dataclass(frozen=True)
class SignalReaders:
    """The signals of the LLM that a strategy reads at one cut.

    Args:
        kinds_by_layer: kinds of signals of layers before the cut, by layer index.
        asked: kinds of signals of the layer of the cut.
        normed: kinds of signals that are hidden states after the final norm.
    """

    kinds_by_layer: Mapping[int, frozenset[str]]
    asked: frozenset[str]
    normed: frozenset[str] = frozenset()

    @classmethod
    def from_needs(cls, needs: Sequence[Signal], cut: int, modules: DecoderModules) -> SignalReaders:
        """Return the signals of the LLM among the needs of a strategy.

        Args:
            needs: the needs.
            cut: the first layer without the dropped tokens.
            modules: the modules of the LLM.

        Raises:
            ValueError: if a signal belongs to a layer that has not run before the cut, or that has no attention.
        """
        kinds: dict[int, frozenset[str]] = {}
        own = [signal for signal in needs if signal.kind in LLM_SIGNALS]
        asked = frozenset(signal.kind for signal in own) & ASKED_SIGNALS
        if asked and cut not in modules.attention_layers:
            raise ValueError(
                f"{', '.join(sorted(asked))} needs attention in layer {cut} of the LLM, which has none; set a cut at "
                f"one of the layers {', '.join(map(str, modules.attention_layers))}"
            )
        for signal in own:
            if signal.kind in ASKED_SIGNALS | NORMED_SIGNALS:
                continue
            before = modules.layer_before(cut)
            for layer in signal.resolve(len(modules.layers), before):
                if layer >= cut:
                    raise ValueError(
                        f"{signal.kind} of layer {layer} is not computed before the cut at layer {cut}; read a layer "
                        f"from 0 to {cut - 1}"
                    )
                if signal.kind not in LLM_HIDDEN_SIGNALS and layer not in modules.attention_layers:
                    raise ValueError(
                        f"{signal.kind} needs attention in layer {layer} of the LLM, which has none; read one of the "
                        f"layers {', '.join(map(str, modules.attention_layers))}"
                    )
                kinds[layer] = kinds.get(layer, frozenset()) | {signal.kind}
        return cls(kinds, asked, frozenset(signal.kind for signal in own) & NORMED_SIGNALS)

    @property
    def reads_text(self) -> bool:
        """Whether a signal belongs to the text after an image."""
        kinds = self.asked.union(self.normed, *self.kinds_by_layer.values())
        return bool(kinds & (LLM_TEXT_SIGNALS | TEXT_ROW_SIGNALS))
