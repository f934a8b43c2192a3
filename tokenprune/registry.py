"""Names: finds classes that are shipped, installed as plug-ins, or in a user's file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def kebab(name: str) -> str:
    """Return the kebab-case alias of a class name: `TopNorm` is `top-norm`, `HiRED` is `hired`."""
    return re.sub(r"(?<=[A-Za-z0-9])(?=[A-Z][a-z0-9])", "-", name).lower()


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


def concrete_classes(module: ModuleType, base: type[T]) -> list[type[T]]:
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


def collect(package: str, base: type[T]) -> Mapping[str, type[T]]:
    """Return all classes of a kind by name: those of the package, then those of entry points.

    Raises:
        ValueError: if two classes have the same name.
    """
    found: dict[str, type[T]] = {}
    classes = [member for module in _modules(package) for member in concrete_classes(module, base)]
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
    spelt = {known_name.lower(): known_name for known_name in known}
    near = [spelt[found] for found in difflib.get_close_matches(name.lower(), spelt, n=2, cutoff=0.6)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise LookupError(f"no {what} is called {name!r}.{hint} Known: {', '.join(sorted(known))}")


def load_from_file(reference: str) -> Any:
    """Return a class from a user's file.

    Args:
        reference: ``path/to/file.py:Class``.

    Raises:
        LookupError: if the file or the class is missing.
    """
    path, _, class_name = reference.rpartition(":")
    module = load_module(path)
    found = vars(module).get(class_name)
    if not inspect.isclass(found):
        own = [name for name, one in vars(module).items() if inspect.isclass(one) and one.__module__ == module.__name__]
        raise LookupError(f"{path} has no class {class_name!r}; it has {', '.join(own) or 'no class at all'}")
    return found


def load_module(path: str) -> ModuleType:
    """Import a user's file, once.

    Args:
        path: the Python file.

    Raises:
        LookupError: if there is no such file, or it cannot be imported.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file() or file.suffix != ".py":
        raise LookupError(f"{path} is no Python file; write path/to/file.py")
    name = f"tokenprune_plugin_{file.stem}"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(file):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise LookupError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
        raise
    return module
