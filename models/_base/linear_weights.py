"""Counts the weights of linear maps in any storage format, because FLOPs depend only on their number."""

from __future__ import annotations

from torch import nn

WIDTHS = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf"))
"""Attributes with the widths of a linear map. First pair: torch, its dynamic quantization, bitsandbytes, AWQ, HQQ and
GPTQModel. Second pair: AutoGPTQ. Third pair: `Conv1D` in transformers."""


def linear_weights(module: nn.Module) -> int:
    """Return the number of weights of all linear maps in a module, without biases.

    Weights are counted as rows x columns from the attributes of a module, because quantized weights are packed. If a
    linear map contains linear maps, only the inner maps are counted: a LoRA layer of peft counts as its base layer and
    the two low-rank maps of each adapter. Adapters that are inactive or merged into the base layer are counted, too, as
    long as their maps are in the model; `merge_and_unload` removes them.

    Args:
        module: any module, such as a decoder layer.
    """
    return sum(
        _map_weights(part)
        for part in module.modules()
        if _map_weights(part) and not any(_map_weights(inner) for inner in part.modules() if inner is not part)
    )


def _map_weights(module: nn.Module) -> int:
    """Return rows x columns of a module if it is a linear map, otherwise 0."""
    for inputs, outputs in WIDTHS:
        rows, columns = getattr(module, outputs, None), getattr(module, inputs, None)
        if isinstance(rows, int) and isinstance(columns, int):
            return rows * columns
    return 0
