"""Counts the weights of linear maps in any storage format, because FLOPs depend on their number alone."""

from __future__ import annotations

from torch import nn

WIDTHS = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf"))
"""Attributes that hold the widths of a linear map. The first pair is that of torch, of its dynamic quantization, and of
bitsandbytes, AWQ, HQQ and GPTQModel; the second that of AutoGPTQ; the third that of `Conv1D` in transformers."""


def linear_weights(module: nn.Module) -> int:
    """Return the weights of all linear maps in a module, biases left out.

    Weights are counted as rows x columns from the attributes of a module, because quantized weights are packed. If a
    linear map contains others, only those are counted: a LoRA layer of peft counts as its base layer and the two
    low-rank maps of each adapter. Adapters that are inactive or merged into the base layer are counted too, as long as
    their maps stand in the model; `merge_and_unload` removes them.

    Args:
        module: any module, such as a decoder layer.
    """
    return sum(
        own_weights(part)
        for part in module.modules()
        if own_weights(part) and not any(own_weights(inner) for inner in part.modules() if inner is not part)
    )


def own_weights(module: nn.Module) -> int:
    """Return rows x columns of a module if it is a linear map, else 0."""
    for inputs, outputs in WIDTHS:
        rows, columns = getattr(module, outputs, None), getattr(module, inputs, None)
        if isinstance(rows, int) and isinstance(columns, int):
            return rows * columns
    return 0
