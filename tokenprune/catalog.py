"""Everything that is known by name: strategies, components and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from tokenprune.adapter import Adapter, adapters
from tokenprune.policies import Component
from tokenprune.reducer import TokenReducer
from tokenprune.registry import collect

STRATEGIES = "tokenprune.strategies"
"""Where strategies and components live, and the entry point group of plug-ins."""


@cache
def strategies() -> Mapping[str, type[TokenReducer]]:
    """Return all known strategies by class name."""
    return collect(STRATEGIES, TokenReducer)  # type: ignore[type-abstract]


@cache
def components() -> Mapping[str, type[Component]]:
    """Return all known allocation and selection policies by class name."""
    return collect(STRATEGIES, Component)


__all__ = ["Adapter", "adapters", "components", "strategies"]
