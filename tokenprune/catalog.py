"""Tables of strategies, components and adapters by class name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from tokenprune.adapter import Adapter, adapters
from tokenprune.decoder_reducer import AtLayer
from tokenprune.policies import (
    AllocationPolicy,
    Component,
    MergingPolicy,
    OrderPolicy,
    RelevancePolicy,
    SelectionPolicy,
)
from tokenprune.reducer import Composed, TokenReducer
from tokenprune.registry import collect_classes
from tokenprune.saliency import SaliencyModel

STRATEGIES = "tokenprune.strategies"
"""The package of the shipped strategies and components, and the entry point group of plug-ins."""

WRAPPERS: Mapping[str, type[TokenReducer]] = {"AtLayer": AtLayer, "Composed": Composed}
"""Strategies that are built from other strategies. The command line accepts their names."""
COMPONENT_KINDS: Mapping[str, type[Component]] = {
    "allocation": AllocationPolicy,
    "selection": SelectionPolicy,
    "merging": MergingPolicy,
    "relevance": RelevancePolicy,
    "order": OrderPolicy,
    "saliency model": SaliencyModel,
}
"""The base class of each kind of component."""


def find_kind(component: type) -> str:
    """Return the kind of a component, such as ``"allocation"``; ``"other"`` for other classes.

    Args:
        component: the class.
    """
    return next((kind for kind, base in COMPONENT_KINDS.items() if issubclass(component, base)), "other")


@cache
def strategies() -> Mapping[str, type[TokenReducer]]:
    """Return all strategies by class name: shipped ones and plug-ins."""
    return collect_classes(STRATEGIES, TokenReducer)


@cache
def components() -> Mapping[str, type[Component]]:
    """Return all components of strategies by class name: shipped ones and plug-ins."""
    return collect_classes(STRATEGIES, Component)


__all__ = ["WRAPPERS", "Adapter", "adapters", "components", "find_kind", "strategies"]
