"""Names: finds strategies, components and adapters that are shipped, installed as plug-ins, or in a user's file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tokenprune.adapter import Adapter
from tokenprune.components import AllocationPolicy, Component, SelectionPolicy
from tokenprune.reducer import TokenReducer

T = TypeVar("T")

STRATEGIES = "tokenprune.strategies"
MODELS = "tokenprune.models"


def kebab(name: str) -> str:
    """Return the kebab-case alias of a class name: `TopAttention` is `top-attention`, `HiRED` is `hired`."""
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+", name)
    return "-".join(words).lower()


def _aliases(name: str) -> set[str]:
    return {name, name.lower(), kebab(name), kebab(name).replace("-", "_")}


def _modules(package: str) -> Iterator[ModuleType]:
    """Import the modules of a package and of its `components` folder; other sub-packages are left alone."""
    root = importlib.import_module(package)
    yield root
    for info in pkgutil.iter_modules(root.__path__, f"{package}."):
        if not info.ispkg:
            yield importlib.import_module(info.name)
        elif info.name.endswith(".components"):
            yield from _modules(info.name)


def _concrete(module: ModuleType, base: type[T]) -> list[type[T]]:
    """Return the concrete subclasses of a base that a module itself defines."""
    return [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, base)
        and member.__module__ == module.__name__
        and not inspect.isabstract(member)
        and not member.__name__.startswith("_")
    ]


def _collect(package: str, base: type[T]) -> Mapping[str, type[T]]:
    """Return all classes of a kind by name: those of the package, then those of entry points.

    Raises:
        ValueError: if two classes have the same name.
    """
    found: dict[str, type[T]] = {}
    classes = [member for module in _modules(package) for member in _concrete(module, base)]
    for point in entry_points(group=package):
        loaded = point.load()
        if inspect.isclass(loaded) and issubclass(loaded, base):
            classes.append(loaded)
    for member in classes:
        other = found.setdefault(member.__name__, member)
        if other is not member:
            raise ValueError(
                f"two classes are called {member.__name__}: {other.__module__} and {member.__module__}; rename one"
            )
    return found


@cache
def strategies() -> Mapping[str, type[TokenReducer]]:
    """Return all known strategies by class name."""
    return _collect(STRATEGIES, TokenReducer)  # type: ignore[type-abstract]


@cache
def components() -> Mapping[str, type[Component]]:
    """Return all known allocation and selection policies by class name."""
    return _collect(STRATEGIES, Component)


@cache
def adapters() -> Mapping[str, type[Adapter]]:
    """Return all known adapters by class name."""
    return _collect(MODELS, Adapter)  # type: ignore[type-abstract]


def lookup(name: str, known: Mapping[str, type[T]], what: str) -> type[T]:
    """Return the class of a name.

    Args:
        name: class name, its kebab-case alias, or ``file.py:Class``.
        known: classes by name.
        what: what is looked for, for the error.

    Raises:
        LookupError: if there is no such class; the error names the nearest ones.
    """
    if ".py:" in name:
        from_file: type[T] = load_from_file(name)
        return from_file
    for class_name, member in known.items():
        if name in _aliases(class_name):
            return member
    near = difflib.get_close_matches(name.lower(), [known_name.lower() for known_name in known], n=3, cutoff=0.5)
    hints = [known_name for known_name in known if known_name.lower() in near]
    hint = f" Did you mean {' or '.join(hints)}?" if hints else ""
    raise LookupError(f"no {what} is called {name!r}.{hint} Known: {', '.join(sorted(known))}")


def load_from_file(reference: str) -> Any:
    """Return a class from a user's file.

    Args:
        reference: ``path/to/file.py:Class``.

    Raises:
        LookupError: if the file or the class is missing.
    """
    path_text, _, class_name = reference.rpartition(":")
    path = Path(path_text).expanduser().resolve()
    if not path.is_file():
        raise LookupError(f"{path_text} is no file; write path/to/file.py:ClassName")
    module_name = f"tokenprune_plugin_{path.stem}"
    if module_name not in sys.modules or getattr(sys.modules[module_name], "__file__", None) != str(path):
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    found = vars(sys.modules[module_name]).get(class_name)
    if not inspect.isclass(found):
        classes = [name for name, member in vars(sys.modules[module_name]).items() if inspect.isclass(member)]
        raise LookupError(f"{path_text} has no class {class_name!r}; it has {', '.join(classes) or 'no class at all'}")
    return found


def find_adapter(model: Any) -> Adapter:
    """Return the adapter of a model, bound to it.

    Raises:
        TypeError: if no adapter knows the model; the error names the supported families.
    """
    for adapter in adapters().values():
        if adapter.matches(model):
            return adapter(model)
    families = ", ".join(sorted(f"{adapter.family} ({adapter.model_class})" for adapter in adapters().values()))
    raise TypeError(
        f"no adapter knows {type(model).__name__}. Supported: {families}. For another family, subclass "
        "tokenprune.adapter.Adapter and register it under the entry point group 'tokenprune.models'"
    )


__all__ = [
    "AllocationPolicy",
    "SelectionPolicy",
    "adapters",
    "components",
    "find_adapter",
    "kebab",
    "load_from_file",
    "lookup",
    "strategies",
]
