"""Reads the shape of a language model from its config and its layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tokenprune.adapter import LLMShape
from tokenprune.models._base.linear_weights import linear_weights


def read_llm_shape(model: Any, layers: Iterable[nn.Module]) -> LLMShape:
    """Return the shape of the language model of a vision-language model.

    Args:
        model: the model.
        layers: its decoder layers.
    """
    config = model.config.get_text_config()
    return LLMShape(
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        layer_parameters=tuple(linear_weights(layer) for layer in layers),
        head_parameters=config.hidden_size * config.vocab_size,
        element_bytes=model.dtype.itemsize,
    )
