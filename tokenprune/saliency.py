"""What stands in for the attention of a CLS token: many vision towers have none. Pure functions.

A strategy asks for ``"cls_attention"``. In a tower without a CLS token the attention that each token receives from all
others takes its place, as VisionZip does for SigLIP (Yang et al., CVPR 2025, arXiv 2412.04467), or the attention of the
probe with which SigLIP's head pools its tokens. What was read is said by `Run.attention`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import resolve_layers

Attention: TypeAlias = Literal["auto", "cls", "received", "pooling"]
"""Where attention over the tokens of a tile comes from; ``"auto"``: CLS if there is one, else what tokens receive."""
SOURCES: Mapping[str, str] = {
    "cls": "cls_attention",
    "received": "received_attention",
    "pooling": "pooling_attention",
}
"""The signal that each choice reads."""


def attention_source(choice: Attention, provides: Collection[str]) -> str:
    """Return the kind of signal that a strategy is given as ``"cls_attention"``.

    Args:
        choice: what the strategy's `attention` says.
        provides: kinds of signals that the model gives.
    """
    if choice == "auto":
        return next((SOURCES[one] for one in ("cls", "received") if SOURCES[one] in provides), SOURCES["cls"])
    return SOURCES[choice]


def read_from(needs: Sequence[Signal], source: str) -> list[Signal]:
    """Return the signals to capture so that `source` can stand in for CLS attention.

    Args:
        needs: what a strategy declares.
        source: kind of the signal that is read in place of ``"cls_attention"``.
    """
    return [one._replace(kind=source) if one.kind == SOURCES["cls"] else one for one in needs]


def standing_in(image: EncodedImage, needs: Sequence[Signal], source: str) -> EncodedImage:
    """Return an image whose CLS attention is the signal that stands in for it.

    Args:
        image: the encoded image, with the signal captured.
        needs: what the strategy declares.
        source: kind of that signal; the image stays as it is if it is CLS attention itself.
    """
    layers = {
        layer
        for signal in needs
        if signal.kind == SOURCES["cls"]
        for layer in resolve_layers(signal.layer, image.layers, image.feature_layer)
    }
    if source == SOURCES["cls"] or not layers:
        return image
    found = {(SOURCES["cls"], layer): image.signals[source, layer] for layer in layers}
    return replace(image, signals={**image.signals, **found})
