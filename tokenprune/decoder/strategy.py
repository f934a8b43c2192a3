"""A strategy bound to the layers of a live LLM: it selects tokens at each cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from tokenprune.adapter import Adapter
from tokenprune.batch import BatchSelection, BatchSelector
from tokenprune.capabilities import HasDecoder, require_capability
from tokenprune.decoder.narrow_layers import NarrowLayers
from tokenprune.decoder.plan import CutContext, CutView, DecoderPlan, PromptLayout
from tokenprune.decoder_reducer import DecoderReducer, as_entered_budget, resolve_cut
from tokenprune.geometry import TileGeometry
from tokenprune.image import DeferredTensor, EncodedImage
from tokenprune.prepared_call import PreparedCall


class BoundDecoderReducer:
    """A strategy inside the LLM, bound to the layers of a model.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.

    Raises:
        ValueError: if a cut is not inside the LLM, cuts do not ascend, or positions cannot be counted anew.
    """

    def __init__(self, reducer: DecoderReducer, adapter: Adapter) -> None:
        self.reducer, self.model = reducer, adapter.model
        self.modules = require_capability(adapter, HasDecoder).decoder_modules
        count = len(self.modules.layers)
        self.cuts = tuple(resolve_cut(cut.layer, count) for cut in reducer.cuts)
        """The first layer of each cut."""
        if sorted(set(self.cuts)) != list(self.cuts):
            raise ValueError(
                f"the cuts {[cut.layer for cut in reducer.cuts]} are layers {list(self.cuts)} of {count} layers; "
                "set cuts that ascend"
            )
        reindexes = reducer.positions == "reindex"
        if reindexes and adapter.has_vision_positions:
            raise ValueError(
                f'positions="reindex" would remove the place of a token in its image from the positions of '
                f'{type(adapter.model).__name__} (M-RoPE); set positions="preserve"'
            )
        self.layers = NarrowLayers(self.modules, self.cuts, reindexes)
        """The hooks of the layers."""
        self._selectors = [BatchSelector(reducer.at_cut(cut)) for cut in reducer.cuts]

    def keeps_all(self, layouts: Sequence[TileGeometry]) -> bool:
        """Return whether the budget of every cut grants all tokens of every image.

        Args:
            layouts: the layout of each image.
        """
        budgets = [as_entered_budget(cut.budget) for cut in self.reducer.cuts]
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
        return self._selectors[cut].select(build_images(view))


def build_images(view: CutView) -> Sequence[EncodedImage]:
    """Return the images with hidden states as features."""
    packed = view.hidden[view.rows, view.positions].split(view.lengths)
    return [
        replace(
            image,
            geometry=layout,
            compute_features=DeferredTensor(partial(layout.unpack, tokens)),
            device=view.hidden.device,
        )
        for image, layout, tokens in zip(view.images, view.layouts, packed, strict=True)
    ]
