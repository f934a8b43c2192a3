"""Compares the signals that a strategy needs with the signals that a model provides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenprune.image import LLM_SIGNALS, STEP_SIGNALS
from tokenprune.saliency import SaliencyModel, list_attention_layers, resolve_attention_source, resolve_needs

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter
    from tokenprune.encoder_reducer import EncoderReducer
    from tokenprune.reducer import TokenReducer


def list_available_signals(reducer: TokenReducer, adapter: Adapter) -> frozenset[str]:
    """Return the kinds of signals that a model provides at the stages of a strategy.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
    """
    stages = [part.stage for part in reducer.list_parts()]
    missing = frozenset() if any(stage.reads_llm for stage in stages) else LLM_SIGNALS
    missing |= frozenset() if any(stage.reads_tower_layer for stage in stages) else STEP_SIGNALS
    return adapter.provides - missing


def list_missing_signals(reducer: TokenReducer, adapter: Adapter) -> list[str]:
    """Return the sorted kinds of signals that a strategy needs and a model does not provide.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
    """
    needs = resolve_needs(reducer.needs, resolve_attention_source(reducer.attention, adapter.provides))
    return sorted({signal.kind for signal in needs} - list_available_signals(reducer, adapter))


def describe_missing_signals(reducer: TokenReducer, adapter: Adapter) -> str | None:
    """Return a message about the signals that a model does not provide for a strategy; None if it provides all.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
    """
    name = type(reducer).__name__
    if missing := list_missing_signals(reducer, adapter):
        needs = resolve_needs(reducer.needs, resolve_attention_source(reducer.attention, adapter.provides))
        available = list_available_signals(reducer, adapter)
        return (
            f"{name} needs {', '.join(sorted({signal.kind for signal in needs}))}, but {type(adapter.model).__name__} "
            f"with this vision tower provides {', '.join(sorted(available))}; missing: {', '.join(missing)}"
        )
    if reducer.text_model is None and reducer.reads_question:
        return (
            f"{name} reads the question, which requires the text tower that belongs to the vision "
            "tower: set text_model to the CLIP checkpoint that the tower comes from (LLaVA: "
            "'openai/clip-vit-large-patch14-336'; embedded models: their own name, 'mini' or 'mini-pages')"
        )
    return None


def list_patch_reducers(reducer: TokenReducer) -> list[EncoderReducer]:
    """Return the parts of a strategy that drop or merge patches inside the vision tower."""
    parts: list[Any] = [part for part in reducer.list_parts() if part.stage.reads_tower_layer]
    return parts


def describe_missing_steps(reducer: TokenReducer, adapter: Adapter) -> str | None:
    """Return a message if a strategy inside the vision tower needs steps that a model does not support, else None.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
    """
    for part in list_patch_reducers(reducer):
        step, name = "merge" if part.merges else "drop", type(adapter.model).__name__
        if step not in adapter.patch_steps:
            supported = " and ".join(sorted(adapter.patch_steps)) or "neither drop nor merge"
            return (
                f"{type(part).__name__} needs to {step} patches inside the vision tower of {name}, which supports: "
                f"{supported}; use a strategy of another stage, or one that only drops patches"
            )
    return None


def describe_attention(reducer: TokenReducer, adapter: Adapter) -> str | None:
    """Return the name of the source that a strategy reads as CLS attention; None if it reads no CLS attention.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
    """
    if not list_attention_layers(reducer.needs):
        return None
    source = reducer.attention
    return source.name if isinstance(source, SaliencyModel) else resolve_attention_source(source, adapter.provides)
