"""Layer choices: the layers of the vision tower or of the LLM from which a strategy reads a signal."""

from __future__ import annotations

from typing import Literal, TypeAlias

LayerChoice: TypeAlias = Literal["first", "feature"] | int | float | list[int | float | str]
"""A layer of the vision tower, in one of five forms.

* ``"first"``: the first layer;
* ``"feature"``: the layer whose output the model uses as visual features;
* an int: a layer index; a negative index counts from the end, as in timm;
* a float between 0 and 1: a relative depth (0.0 is the first layer, 1.0 the last layer);
* a list of these: the mean over several layers.
"""
LLMLayerChoice: TypeAlias = Literal["before"] | LayerChoice
"""A layer of the LLM: ``"before"``, the deepest layer with attention before the cut, or one of the forms above."""


def resolve_layers(
    choice: LLMLayerChoice, layers: int, feature_layer: int, model: Literal["vision tower", "LLM"] = "vision tower"
) -> tuple[int, ...]:
    """Return the layer indices that a layer choice selects.

    Args:
        choice: the layer choice.
        layers: number of layers of the model.
        feature_layer: index of the layer whose output the model uses; in an LLM, of the layer before the cut.
        model: whether the layers belong to a vision tower or to an LLM.

    Returns:
        Layer indices in ``range(layers)``; several indices mean an average over these layers.

    Raises:
        ValueError: if the choice does not select a layer of this model.
    """
    if isinstance(choice, (list, tuple)):
        if not choice:
            raise ValueError("a layer choice that is a list needs at least one layer")
        parts = (resolve_layers(part, layers, feature_layer, model) for part in choice)  # type: ignore[arg-type]
        return tuple(index for part in parts for index in part)
    if choice == "first":
        return (0,)
    default = "before" if model == "LLM" else "feature"
    if choice in ("feature", default):
        return (feature_layer,)
    if isinstance(choice, float) and 0.0 <= choice <= 1.0:
        return (round(choice * (layers - 1)),)
    if isinstance(choice, int) and not isinstance(choice, bool) and -layers <= choice < layers:
        return (choice % layers,)
    raise ValueError(
        f"layer {choice!r} is no layer of a {model} with {layers} layers; use 'first', {default!r}, an index from "
        f"{-layers} to {layers - 1}, a relative depth from 0.0 to 1.0, or a list of these"
    )
