"""Encoded images with random signals, for tests of a strategy without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from tokenprune.geometry import TileGeometry
from tokenprune.image import (
    CLS_SIGNALS,
    KEY_SIGNALS,
    LLM_TEXT_SIGNALS,
    ROW_SIGNALS,
    TEXT_ROW_SIGNALS,
    TEXT_SIGNALS,
    EncodedImage,
)

LAYERS, FEATURE_LAYER = 4, 2
"""Number of layers of the tower, and the layer whose output the projector receives."""
TEXT_SHAPES = MappingProxyType({"question": (2,), "question_tokens": (4,), "question_positions": (2, 7)})
"""Shape of each text signal without the width."""
PROMPT_TOKENS = 6
"""Number of text tokens after the image, in signals of the LLM."""
TOKEN_SIGNALS = frozenset({"keys", "vision_features", "aligned_features", "projector_inputs"})
"""Kinds of signals with one vector per token."""
LAYER_SIGNALS = (
    "joint_attention",
    "keys",
    "cls_features",
    "aligned_cls",
    "aligned_features",
    "cls_logits",
    "received_attention",
    "vision_features",
)
SIGNAL_KEYS = (
    *(("cls_attention", layer) for layer in range(LAYERS)),
    *((kind, layer) for layer in range(LAYERS) for kind in LAYER_SIGNALS),
    *((kind, FEATURE_LAYER) for kind in ("projector_inputs", *TEXT_SHAPES)),
)
"""Kind and layer of every signal of `random_encoded_image`, in the order in which they are drawn."""

Draw: TypeAlias = Callable[[str, tuple[int, ...], torch.Generator], Tensor]
"""Returns random values with a shape, for a kind of signal or for ``"features"``."""


def draw_normal(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return attention rows that sum to at most 1, or normally distributed values of other signals."""
    if kind == "received_attention":
        return torch.rand(shape, generator=generator) / shape[-1]
    if kind in ROW_SIGNALS and kind != "cls_logits":  # the CLS token receives the remaining attention
        return torch.randn(*shape[:-1], shape[-1] + 1, generator=generator).softmax(-1)[..., 1:]
    return torch.randn(shape, generator=generator)


def random_encoded_image(
    geometry: TileGeometry,
    seed: int = 0,
    heads: int = 3,
    dim: int = 5,
    *,
    keys: Iterable[tuple[str, int]] = SIGNAL_KEYS,
    draw: Draw = draw_normal,
    widths: Mapping[str, int] = MappingProxyType({}),
    text_shapes: Mapping[str, tuple[int, ...]] = TEXT_SHAPES,
    layers: int = LAYERS,
    feature_layer: int = FEATURE_LAYER,
) -> EncodedImage:
    """Return an encoded image with random features and signals; features of invalid tokens are zero.

    Args:
        geometry: the layout of the tiles.
        seed: seed of the random values.
        heads: number of attention heads.
        dim: width of features, keys, text embeddings and further signals.
        keys: kind and layer of each signal; by default every kind.
        draw: draws the values of a signal.
        widths: width of a kind of signal where it differs from ``dim``.
        text_shapes: shape of each kind of text signal without the width.
        layers: number of layers of the vision tower.
        feature_layer: layer whose output the projector receives.
    """
    generator = torch.Generator().manual_seed(seed)
    tiles, tokens = geometry.tiles, geometry.tokens

    def signal_shape(kind: str) -> tuple[int, ...]:
        """Return the shape of a kind of signal; an unknown kind has one vector per token."""
        width = widths.get(kind, dim)
        if kind in ROW_SIGNALS:
            return tiles, 1 if kind == "joint_attention" else heads, tokens
        if kind in TEXT_SIGNALS:
            return *text_shapes[kind], width
        if kind in KEY_SIGNALS:
            return tiles, heads, tokens, width
        if kind in TEXT_ROW_SIGNALS:
            return tiles, 1 if kind == "rotary_similarity" else heads, PROMPT_TOKENS, tokens
        if kind in LLM_TEXT_SIGNALS:
            return (heads, PROMPT_TOKENS, width) if kind == "text_keys" else (PROMPT_TOKENS, width)
        if kind == "token_transition":
            return tiles, tokens, 1
        return tiles, 1 if kind in CLS_SIGNALS else tokens, width

    signals = {(kind, layer): draw(kind, signal_shape(kind), generator) for kind, layer in keys}
    features = draw("features", (tiles, tokens, dim), generator) * geometry.valid[..., None]
    return EncodedImage(geometry, features, signals, layers=layers, feature_layer=feature_layer)
