"""Encoded images with random signals, for tests of a strategy without a model."""

from __future__ import annotations

import torch

from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage

LAYERS, FEATURE_LAYER = 4, 2
"""Number of layers of the tower, and the layer whose output the projector receives."""


def random_encoded_image(geometry: TileGeometry, seed: int = 0, heads: int = 3, dim: int = 5) -> EncodedImage:
    """Return an encoded image with random features and every signal; features of invalid tokens are zero.

    Args:
        geometry: the layout of the tiles.
        seed: seed of the random values.
        heads: number of attention heads.
        dim: width of features, keys and text embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    tiles, tokens = geometry.tiles, geometry.tokens
    signals = {
        ("cls_attention", layer): torch.randn(tiles, heads, tokens + 1, generator=generator).softmax(-1)[..., 1:]
        for layer in range(LAYERS)
    }
    for layer in range(LAYERS):
        signals["joint_attention", layer] = torch.randn(tiles, 1, tokens + 1, generator=generator).softmax(-1)[..., 1:]
        signals["keys", layer] = torch.randn(tiles, heads, tokens, dim, generator=generator)
        signals["cls_features", layer] = torch.randn(tiles, 1, dim, generator=generator)
        signals["aligned_cls", layer] = torch.randn(tiles, 1, dim, generator=generator)
        signals["aligned_features", layer] = torch.randn(tiles, tokens, dim, generator=generator)
        signals["cls_logits", layer] = torch.randn(tiles, heads, tokens, generator=generator)
        signals["received_attention", layer] = torch.rand(tiles, heads, tokens, generator=generator) / tokens
        signals["vision_features", layer] = torch.randn(tiles, tokens, dim, generator=generator)
    signals["projector_inputs", FEATURE_LAYER] = torch.randn(tiles, tokens, dim, generator=generator)
    signals["question", FEATURE_LAYER] = torch.randn(2, dim, generator=generator)
    signals["question_tokens", FEATURE_LAYER] = torch.randn(4, dim, generator=generator)
    features = torch.randn(tiles, tokens, dim, generator=generator) * geometry.valid[..., None]
    signals["question_positions", FEATURE_LAYER] = torch.randn(2, 7, dim, generator=generator)
    return EncodedImage(geometry, features, signals, layers=LAYERS, feature_layer=FEATURE_LAYER)
