"""Tables of strategies, components and adapters by class name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from tokenprune.adapter import Adapter, adapters
from tokenprune.decoder_reducer import AtLayer
from tokenprune.policies import Component
from tokenprune.reducer import Composed, TokenReducer
from tokenprune.registry import collect_classes

STRATEGIES = "tokenprune.strategies"
"""The package of the shipped strategies and components, and the entry point group of plug-ins."""

WRAPPERS: Mapping[str, type[TokenReducer]] = {"AtLayer": AtLayer, "Composed": Composed}
"""Strategies that are built from other strategies. The command line accepts their names."""


@cache
def strategies() -> Mapping[str, type[TokenReducer]]:
    """Return all strategies by class name: shipped ones and plug-ins."""
    return collect_classes(STRATEGIES, TokenReducer)


@cache
def components() -> Mapping[str, type[Component]]:
    """Return all components of strategies by class name: shipped ones and plug-ins."""
    return collect_classes(STRATEGIES, Component)


__all__ = ["WRAPPERS", "Adapter", "adapters", "components", "strategies"]
