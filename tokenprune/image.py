"""The input of a strategy: the features of an image, its captured signals and its layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tokenprune.geometry import TileGeometry
from tokenprune.layers import LayerChoice, LLMLayerChoice, resolve_layers
from tokenprune.literals import check_literal
from tokenprune.registry import suggest_name

SignalKey: TypeAlias = tuple[str, int]
"""Kind and layer of a captured signal."""
ASKED_SIGNALS = frozenset(
    {"asked_last_attention", "asked_text_attention", "asked_visual_attention", "asked_keys", "unrotated_attention"}
)
"""Kinds of signals that the layer of a cut would compute on all tokens. They cost the query and key maps of a layer."""
NORMED_SIGNALS = frozenset({"normed_hidden", "normed_text_hidden"})
"""Kinds of signals that are hidden states entering the layer of the cut, after the final norm of the LLM."""
LLM_TEXT_SIGNALS = frozenset({"text_hidden", "text_keys", "normed_text_hidden"})
"""Kinds of signals of the LLM at the text after the image, `[..., text, width]`."""
TEXT_ROW_SIGNALS = frozenset({"text_attention", "asked_text_attention", "rotary_similarity"})
"""Kinds of signals of the LLM with a row for each text token after the image, `[tiles, heads, text, tokens]`."""
LLM_HIDDEN_SIGNALS = frozenset({"llm_hidden", "text_hidden"})
"""Kinds of signals that are inputs of a layer of the LLM."""
LLM_ATTENTION_SIGNALS = frozenset(
    {"last_text_attention", "text_attention", "visual_attention", "llm_keys", "text_keys"}
)
"""Kinds of signals that come from queries and keys of a layer of the LLM before the cut."""
LLM_SIGNALS = (
    LLM_ATTENTION_SIGNALS
    | LLM_HIDDEN_SIGNALS
    | NORMED_SIGNALS
    | ASKED_SIGNALS
    | {"token_transition", "rotary_similarity"}
)
"""Kinds of signals that come from the LLM at a cut."""
ROW_SIGNALS = frozenset(
    {"cls_attention", "cls_logits", "joint_attention", "pooling_attention", "received_attention"}
    | {"last_text_attention", "visual_attention"}
    | {"asked_last_attention", "asked_visual_attention", "unrotated_attention"}
)
"""Kinds of signals with one number per head and token, `[tiles, heads, tokens]`."""
KEY_SIGNALS = frozenset({"keys", "llm_keys", "asked_keys"})
"""Kinds of signals with one vector per head and token, `[tiles, heads, tokens, head_dim]`."""
CLS_SIGNALS = frozenset({"cls_features", "aligned_cls"})
"""Kinds of signals with one vector per tile, `[tiles, 1, width]`."""
ALIGNED_FROM: Mapping[str, str] = {"aligned_features": "vision_features", "aligned_cls": "cls_features"}
"""Kinds of signals in the space that the vision tower shares with its text tower; each maps to its source signal."""
ALIGNED_SIGNALS = frozenset(ALIGNED_FROM)
"""Kinds of signals in the space that the vision tower shares with its text tower."""
APPLICATION_SIGNALS = frozenset({"projector_inputs", "resolution", "patch_removal"})
"""Kinds of signals that applying a selection requires, although `select` never reads them.

Applying a selection mixes ``"projector_inputs"``, encodes an image again at another ``"resolution"``, or runs the
vision tower on the patches of the kept tokens only (``"patch_removal"``).
"""
STEP_SIGNALS = frozenset({"state_change"})
"""Kinds of signals that exist only at a step inside the vision tower, for strategies of the encoder stage."""
BEFORE_TOWER = frozenset({"resolution", "patch_removal"})
"""Kinds of `APPLICATION_SIGNALS` that have no tensor: abilities of the vision tower for strategies before it."""
TEXT_SIGNALS = frozenset({"question", "question_tokens", "question_positions"})
"""Kinds of signals that come from the prompt instead of the image, `[..., width]`."""


SIGNALS = (
    ROW_SIGNALS
    | KEY_SIGNALS
    | CLS_SIGNALS
    | ALIGNED_SIGNALS
    | APPLICATION_SIGNALS
    | TEXT_SIGNALS
    | LLM_SIGNALS
    | {"vision_features"}
)
"""All kinds of signals of the library; the adapter of a plug-in can provide further kinds."""


def token_dim(kind: str) -> int:
    """Return the dimension of a signal that indexes tokens: 1, or more if dimensions of heads and text precede it.

    Args:
        kind: the kind of the signal.
    """
    if kind in TEXT_ROW_SIGNALS:
        return 3
    return 2 if kind in ROW_SIGNALS | KEY_SIGNALS else 1


class DeferredTensor:
    """A tensor that the first call computes and stores, and later calls return.

    Args:
        compute: computes the tensor.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        """Return the tensor."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    def __reduce__(self) -> tuple[type[ComputedTensor], tuple[Tensor]]:
        """Return the parts of a pickle or copy: the tensor instead of the function that computes it."""
        return ComputedTensor, (self(),)


class ComputedTensor(DeferredTensor):
    """A tensor that is already computed.

    Args:
        value: the tensor.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__(lambda: value)
        self._value = value


IMAGE_FIELDS = ("features", "geometry", "pixels", "newline")
"""Fields of an image that are available without a declaration."""
SIMILAR_SIGNALS = 0.9
"""Similarity to the name of a signal, from 0 to 1, from which another name is misspelt."""


class MissingSignalError(LookupError):
    """A strategy read a signal that its `needs` do not declare."""


class _SignalFields(NamedTuple):
    kind: str
    layer: LLMLayerChoice = "feature"


class Signal(_SignalFields):
    """A tensor that a strategy reads from the vision tower.

    Args:
        kind: the name of the method of `EncodedImage` that reads the signal, such as ``"cls_attention"``.
        layer: the layer or layers to read; a signal that belongs to no layer keeps the default.

    Raises:
        TypeError: if the kind is no text.
        ValueError: if the kind is a misspelt name of a signal, or the layer a misspelt name of a layer.
    """

    __slots__ = ()

    def __new__(cls, kind: str, layer: LLMLayerChoice = "feature") -> Signal:
        """Check the kind and the layer when the signal is declared."""
        if not isinstance(kind, str):
            raise TypeError(f"a signal is declared by its name, such as Signal('cls_attention'), not by {kind!r}")
        if kind in IMAGE_FIELDS:
            raise ValueError(f"{kind} is part of every image and no signal; remove Signal({kind!r}) from `needs`")
        if kind not in SIGNALS and (hint := suggest_name(kind, SIGNALS, SIMILAR_SIGNALS)):
            raise ValueError(f"no signal is called {kind!r}{hint}")
        if isinstance(layer, str):
            check_literal("layer", layer, ("first", "feature", "before"))
        return super().__new__(cls, kind, layer)

    def resolve(self, layers: int, feature_layer: int) -> tuple[int, ...]:
        """Return the layer indices that the signal is read from, see `resolve_layers`.

        Args:
            layers: number of layers of the vision tower or LLM.
            feature_layer: index of the layer whose output the model uses; in an LLM, of the layer before the cut.
        """
        model: Literal["vision tower", "LLM"] = "LLM" if self.kind in LLM_SIGNALS else "vision tower"
        return resolve_layers(self.layer, layers, feature_layer, model)


@dataclass(init=False, eq=False)
class EncodedImage:
    """One encoded image: geometry, features and the captured signals.

    It holds tensors only and no model, so that tests can build it directly.

    Args:
        geometry: the layout of the tiles.
        features: visual tokens as they enter the LLM without reduction, `[tiles, tokens, dim]`; zero for tokens that
            are not valid.
        signals: captured tensors by (kind, layer index).
        layers: number of layers of the vision tower.
        feature_layer: index of the layer whose output the model uses.
        newline: the learned newline token, `[dim]`; None if the model has none.
        pixels: the tiles as images for drawing, uint8 `[tiles, height, width, 3]`.
        depths: number of layers and feature layer of another model (not the vision tower) that a kind of signal comes
            from, by kind.
        compute_features: computes the features at the first access; pass it in place of `features` if most strategies
            do not read them.
        device: device of the tensors; by default the device of `features`.

    Raises:
        TypeError: if neither `features` nor `compute_features` is passed.
    """

    geometry: TileGeometry
    signals: Mapping[SignalKey, Tensor]
    layers: int
    feature_layer: int
    newline: Tensor | None
    pixels: Tensor | None
    depths: Mapping[str, tuple[int, int]]
    compute_features: Callable[[], Tensor]
    device: torch.device

    def __init__(
        self,
        geometry: TileGeometry,
        features: Tensor | None = None,
        signals: Mapping[SignalKey, Tensor] | None = None,
        layers: int = 1,
        feature_layer: int = 0,
        newline: Tensor | None = None,
        pixels: Tensor | None = None,
        depths: Mapping[str, tuple[int, int]] | None = None,
        compute_features: Callable[[], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if features is None and compute_features is None:
            raise TypeError("an EncodedImage needs features [tiles, tokens, dim] or compute_features; pass one of them")
        self.geometry, self.newline, self.pixels = geometry, newline, pixels
        self.signals, self.depths = signals or {}, depths or {}
        self.layers, self.feature_layer = layers, feature_layer
        if features is not None:
            self.compute_features, self.device = ComputedTensor(features), features.device
        elif compute_features is not None:
            is_deferred = isinstance(compute_features, DeferredTensor)  # copies of `dataclasses.replace` share it
            self.compute_features = compute_features if is_deferred else DeferredTensor(compute_features)
            self.device = self.features.device if device is None else torch.device(device)

    def _repr_html_(self) -> str:
        """Return the layout and the captured signals with their shapes as HTML for Jupyter; computes no features."""
        from tokenprune.display import format_table

        rows = [
            [kind, str(layer), str(list(value.shape)), str(value.dtype).removeprefix("torch.")]
            for (kind, layer), value in self.signals.items()
        ]
        layout = self.geometry
        tiles, grid = " x ".join(map(str, layout.tile_grid)), " x ".join(map(str, layout.token_grid))
        caption = f"{layout.tiles} tile(s), sub-images {tiles}, {grid} tokens per tile, {layout.valid_tokens} valid"
        return format_table(["signal", "layer", "shape", "dtype"], rows, caption)

    @property
    def features(self) -> Tensor:
        """Visual tokens as they enter the LLM without reduction, `[tiles, tokens, dim]`."""
        return self.compute_features()

    def with_features(self, features: Tensor) -> EncodedImage:
        """Return the same image with other features.

        Args:
            features: visual tokens, `[tiles, tokens, dim]`.
        """
        return replace(self, compute_features=ComputedTensor(features), device=features.device)

    def with_signals(
        self, signals: Mapping[SignalKey, Tensor], depths: Mapping[str, tuple[int, int]] | None = None
    ) -> EncodedImage:
        """Return the same image with additional signals.

        Args:
            signals: tensors by (kind, layer index).
            depths: number of layers and feature layer of another model that a kind of signal comes from, by kind.
        """
        return replace(self, signals={**self.signals, **signals}, depths={**self.depths, **(depths or {})})

    def flatten_tiles(self) -> EncodedImage:
        """Return the image with the valid tokens of all tiles as one tile of a single row, in packed order.

        It is the input of strategies that treat an image as one sequence.
        """
        layout = self.geometry.to(self.device)

        def flatten(kind: str, value: Tensor) -> Tensor:
            if kind in TEXT_SIGNALS | LLM_TEXT_SIGNALS:
                return value
            if kind in CLS_SIGNALS:
                return value[:1]
            dim = token_dim(kind)
            flat = value.movedim(0, dim - 1).flatten(dim - 1, dim)[None]
            return flat.index_select(dim, layout.token_order)

        return replace(
            self,
            geometry=layout.original.flat.to(self.device),
            signals={key: flatten(key[0], value) for key, value in self.signals.items()},
            pixels=None,
            compute_features=DeferredTensor(lambda: flatten("features", self.features)),
        )

    def read(self, signal: Signal) -> Tensor:
        """Return a captured signal, averaged over its layers in float32.

        Raises:
            MissingSignalError: if the signal was not captured because no `needs` declared it.
        """
        values = []
        depth = self.depths.get(signal.kind, (self.layers, self.feature_layer))
        for layer in signal.resolve(*depth):
            if (signal.kind, layer) not in self.signals:
                captured = ", ".join(f"{kind} of layer {index}" for kind, index in sorted(self.signals)) or "none"
                raise MissingSignalError(
                    f"{signal.kind} of layer {layer} was not captured (captured: {captured}); "
                    f"declare Signal({signal.kind!r}, {signal.layer!r}) in the strategy's `needs`"
                )
            values.append(self.signals[signal.kind, layer].float())
        return values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)

    def cls_attention(self, layer: LayerChoice) -> Tensor:
        """Return the attention of the CLS token to each token, `[tiles, heads, tokens]`.

        The softmax covers all keys, and the CLS key is removed afterwards, so that rows sum to less than 1.

        Args:
            layer: the layer to read, or several layers to average.
        """
        return self.read(Signal("cls_attention", layer))

    def cls_logits(self, layer: LayerChoice) -> Tensor:
        """Return the logits of CLS attention, before the softmax, `[tiles, heads, tokens]`."""
        return self.read(Signal("cls_logits", layer))

    def received_attention(self, layer: LayerChoice) -> Tensor:
        """Return the attention that each token receives, averaged over all queries, `[tiles, heads, tokens]`."""
        return self.read(Signal("received_attention", layer))

    def pooling_attention(self, layer: LayerChoice = "feature") -> Tensor:
        """Return the attention of a pooling head's learned query to each token, `[tiles, heads, tokens]`.

        The head follows the last layer, so that every layer choice returns the same tensor. Rows sum to 1.

        Args:
            layer: a layer choice that `needs` declares.
        """
        return self.read(Signal("pooling_attention", layer))

    def keys(self, layer: LayerChoice) -> Tensor:
        """Return the attention keys of a layer, `[tiles, heads, tokens, head_dim]`."""
        return self.read(Signal("keys", layer))

    def joint_attention(self, layer: LayerChoice) -> Tensor:
        """Return CLS attention computed with all heads as one wide head, `[tiles, 1, tokens]`."""
        return self.read(Signal("joint_attention", layer))

    def vision_features(self, layer: LayerChoice) -> Tensor:
        """Return the output of a layer of the vision tower, before the projector, `[tiles, tokens, width]`."""
        return self.read(Signal("vision_features", layer))

    def state_change(self, layer: LayerChoice) -> Tensor:
        """Return the change of the patches in the layer before a step inside the tower, `[tiles, patches, width]`.

        It is the input of the layer of the step minus the input of the layer before it.
        """
        return self.read(Signal("state_change", layer))

    def projector_inputs(self) -> Tensor:
        """Return the inputs of the projector, `[tiles, tokens, width]`."""
        return self.read(Signal("projector_inputs"))

    def cls_features(self, layer: LayerChoice) -> Tensor:
        """Return the CLS token in the output of a layer of the vision tower, `[tiles, 1, width]`."""
        return self.read(Signal("cls_features", layer))

    def aligned_features(self, layer: LayerChoice) -> Tensor:
        """Return tokens in the space that the vision tower shares with its text tower, `[tiles, tokens, shared]`.

        They are not normalized: ``visual_projection(post_layernorm(x))`` of CLIP.
        """
        return self.read(Signal("aligned_features", layer))

    def aligned_cls(self, layer: LayerChoice) -> Tensor:
        """Return each tile's CLS token in the space shared with the text tower, not normalized, `[tiles, 1, shared]`.

        For the last layer, it equals CLIP's image embedding.
        """
        return self.read(Signal("aligned_cls", layer))

    def question(self) -> Tensor:
        """Return the question in the shared space, one vector per segment of its text, `[segments, shared]`."""
        return self.read(Signal("question"))

    def question_tokens(self) -> Tensor:
        """Return each text token of the question in the shared space, `[text_tokens, shared]`."""
        return self.read(Signal("question_tokens"))

    def question_positions(self) -> Tensor:
        """Return every position of the text tower's input in the shared space, `[segments, positions, shared]`.

        They include the begin token, the end token and the padding; `question_tokens` returns only the text tokens.
        """
        return self.read(Signal("question_positions"))

    # --- Signals of the LLM, for strategies of the decoder stage ----------------------------------------------------

    def last_text_attention(self, layer: LLMLayerChoice = "before") -> Tensor:
        """Return the attention of the last prompt token to each visual token, `[tiles, heads, tokens]`.

        The softmax covers all keys that the last token reads, so that rows sum to less than 1.

        Args:
            layer: the layer of the LLM to read, or several layers to average; it precedes the cut.
        """
        return self.read(Signal("last_text_attention", layer))

    def text_attention(self, layer: LLMLayerChoice = "before") -> Tensor:
        """Return the attention of each text token after the image to each visual token, `[tiles, heads, text, tokens]`.

        The softmax covers all keys that the text token reads.
        """
        return self.read(Signal("text_attention", layer))

    def rotary_similarity(self, layer: LLMLayerChoice = "before") -> Tensor:
        """Return the dot product of rotated unit vectors of text and visual tokens, `[tiles, 1, text, tokens]`.

        It is ``(cos_q . cos_k + sin_q . sin_k) / sqrt(head_dim)`` of the position embeddings, which equals ``2 * sum of
        cos((position_q - position_k) * frequency) / sqrt(head_dim)`` (SparseVLM, version 2 of the release).
        """
        return self.read(Signal("rotary_similarity", layer))

    def visual_attention(self, layer: LLMLayerChoice = "before") -> Tensor:
        """Return the attention of the visual tokens of the image to each of them, `[tiles, heads, tokens]`.

        It is the mean over the visual tokens as queries. The softmax covers all keys that a query reads.
        """
        return self.read(Signal("visual_attention", layer))

    def llm_keys(self, layer: LLMLayerChoice = "before") -> Tensor:
        """Return the attention keys of the visual tokens in a layer of the LLM, `[tiles, kv_heads, tokens, head_dim]`.

        Keys are rotated: position embeddings are applied.
        """
        return self.read(Signal("llm_keys", layer))

    def text_keys(self, layer: LLMLayerChoice = "before") -> Tensor:
        """Return the attention keys of the text tokens after the image, `[kv_heads, text, head_dim]`."""
        return self.read(Signal("text_keys", layer))

    def llm_hidden(self, layer: LLMLayerChoice = "before") -> Tensor:
        """Return the input of a layer of the LLM at the visual tokens, `[tiles, tokens, dim]`.

        The input of layer 0 are the embeddings. The input of the layer of the cut is `features`.
        """
        return self.read(Signal("llm_hidden", layer))

    def text_hidden(self, layer: LLMLayerChoice = "before") -> Tensor:
        """Return the input of a layer of the LLM at the text tokens after the image, `[text, dim]`."""
        return self.read(Signal("text_hidden", layer))

    def normed_hidden(self) -> Tensor:
        """Return the hidden states of the visual tokens that enter the layer of the cut, `[tiles, tokens, dim]`.

        The final norm of the LLM is applied, as DART compares tokens.
        """
        return self.read(Signal("normed_hidden"))

    def normed_text_hidden(self) -> Tensor:
        """Return the hidden states of the text after the image as `normed_hidden`, `[text, dim]`."""
        return self.read(Signal("normed_text_hidden"))

    def token_transition(self, layer: LLMLayerChoice = "before") -> Tensor:
        """Return how much a layer of the LLM changes each visual token, `[tiles, tokens, 1]` (TransPrune, CVPR 2026).

        It is the sum over attention and MLP of ``|out| / |in| * softmax(1 - cos(in, out))``. ``in`` and ``out`` are
        input and output of the module without the residual; the softmax covers the tokens of the prompt.
        """
        return self.read(Signal("token_transition", layer))

    def asked_last_attention(self) -> Tensor:
        """Return `last_text_attention` of the layer of the cut, computed on all tokens, `[tiles, heads, tokens]`."""
        return self.read(Signal("asked_last_attention"))

    def asked_text_attention(self) -> Tensor:
        """Return `text_attention` of the layer of the cut, computed on all tokens, `[tiles, heads, text, tokens]`."""
        return self.read(Signal("asked_text_attention"))

    def asked_visual_attention(self) -> Tensor:
        """Return `visual_attention` of the layer of the cut, computed on all tokens, `[tiles, heads, tokens]`."""
        return self.read(Signal("asked_visual_attention"))

    def asked_keys(self) -> Tensor:
        """Return the keys of the visual tokens in the layer of the cut, `[tiles, kv_heads, tokens, head_dim]`."""
        return self.read(Signal("asked_keys"))

    def unrotated_attention(self) -> Tensor:
        """Return `asked_last_attention` without position embeddings (FEATHER, ICCV 2025), `[tiles, heads, tokens]`."""
        return self.read(Signal("unrotated_attention"))
