"""Examples: a tiny model of each family with random weights, and inputs for it, for checks without a hub.

`tokenprune.testing.families` holds the examples of the shipped adapters.

>>> example = build_example(LlavaNextAdapter)
>>> out = example.adapter.model(**example.build_inputs([[(112, 112)], [(60, 160)]]))
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from tokenprune.adapter import Adapter
from tokenprune.registry import collect_classes, list_subclasses
from tokenprune.testing.examples.base import Example

EXAMPLES = "tokenprune.testing.families"
"""The package of the shipped examples, and the entry point group of plug-ins."""


@cache
def _registered_examples() -> Mapping[type[Adapter], type[Example]]:
    """Return the example classes of the package and of plug-ins by adapter class."""
    classes = collect_classes(EXAMPLES, Example).values()
    return {example.adapter_class: example for example in classes}


def find_example(adapter_class: type[Adapter]) -> type[Example]:
    """Return the class of the example model of an adapter class.

    Shipped examples and plug-ins come first, then examples that were defined in this session.

    Raises:
        LookupError: if the adapter has no example.
    """
    session = {kind.adapter_class: kind for kind in list_subclasses(Example)}
    example = _registered_examples().get(adapter_class) or session.get(adapter_class)
    if example is None:
        raise LookupError(
            f"{adapter_class.__name__} has no example model; subclass tokenprune.testing.examples.Example and, in a "
            f"package, register the class under the entry point group {EXAMPLES}: docs/how-to/write-an-adapter.md"
        )
    return example


def build_example(adapter_class: type[Adapter]) -> Example:
    """Return an example with a new tiny model, bound to an adapter of the class.

    Raises:
        LookupError: if the adapter has no example.
    """
    example = find_example(adapter_class)
    return example(adapter_class(example.build_model()))


__all__ = ["EXAMPLES", "Example", "build_example", "find_example"]
