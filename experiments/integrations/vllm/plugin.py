"""The vLLM plug-in: images with different numbers of kept tokens can stand in one batch and in one prompt.

vLLM describes image embeddings of the LLaVA models as one tensor, and its engine stops if two images of a batch have
different lengths. The plug-in marks the length as a dynamic dimension, which the rest of vLLM supports. vLLM calls
`register` in each of its processes; ``VLLM_PLUGINS=""`` disables all plug-ins.
"""

from __future__ import annotations

import importlib
import warnings

__all__ = ["TRIED_VERSIONS", "register"]

TRIED_VERSIONS = ("0.32.0",)
"""The versions of vLLM with which the plug-in was run."""
SCHEMAS = {
    "llava": "LlavaImageEmbeddingInputs",
    "llava_next": "LlavaNextImageEmbeddingInputs",
    "llava_onevision": "LlavaOnevisionImageEmbeddingInputs",
    "interns1": "InternS1ImageEmbeddingInputs",
}
"""The description of image embeddings in each model module of vLLM; `interns1` runs InternVL checkpoints."""


def register() -> None:
    """Mark the length of image embeddings as a dynamic dimension; with a version that was not tried, only warn."""
    import vllm  # type: ignore[import-not-found]

    if vllm.__version__ not in TRIED_VERSIONS:
        warnings.warn(
            f"the vLLM plug-in of tokenprune does nothing: it was run with vLLM {', '.join(TRIED_VERSIONS)}, but this "
            f"is {vllm.__version__}. Images of different kept lengths may stop the engine; serve with --max-num-seqs 1",
            stacklevel=2,
        )
        return
    for module, name in SCHEMAS.items():
        allow_lengths(getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name))


def allow_lengths(schema: type) -> None:
    """Mark the second dimension of the field `data` of a schema of vLLM as dynamic, and accept a list of tensors.

    Args:
        schema: a subclass of vLLM's `TensorSchema` with the field `data`, `[images, length, dim]`.
    """
    from typing import Annotated, get_type_hints

    import torch
    from vllm.utils.tensor_schema import TensorShape  # type: ignore[import-not-found]

    (shape,) = get_type_hints(schema, include_extras=True)["data"].__metadata__
    dynamic = TensorShape(*shape.dims, dynamic_dims={*shape.dynamic_dims, shape.dims[1]})
    schema.__annotations__["data"] = Annotated[torch.Tensor | list[torch.Tensor], dynamic]
