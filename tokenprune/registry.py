"""Finds classes by name: in the package, in installed plug-ins, or in a Python file of the user."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

PLUGIN_PREFIX = "tokenprune_plugin_"
"""Start of the names of modules that are Python files of the user."""


def to_kebab_case(name: str) -> str:
    """Return the kebab-case alias of a class name: `TopNorm` is `top-norm`, `HiRED` is `hired`."""
    return re.sub(r"(?<=[A-Za-z0-9])(?=[A-Z][a-z0-9])", "-", name).lower()


def _list_aliases(name: str) -> set[str]:
    return {name, name.lower(), to_kebab_case(name), to_kebab_case(name).replace("-", "_")}


def _import_modules(package: str) -> Iterator[ModuleType]:
    """Import and yield the modules of a package and of its folders of strategies and components."""
    root = importlib.import_module(package)
    yield root
    for info in pkgutil.iter_modules(root.__path__, f"{package}."):
        if not info.ispkg:
            yield importlib.import_module(info.name)
        elif info.name.endswith((".components", ".decoder", ".encoder")):
            yield from _import_modules(info.name)


def list_defined_classes(module: ModuleType) -> list[type]:
    """Return the classes that are defined in a module; imported classes are not included."""
    return [
        member for member in vars(module).values() if inspect.isclass(member) and member.__module__ == module.__name__
    ]


def list_concrete_classes(module: ModuleType, base: type[T]) -> list[type[T]]:
    """Return the concrete subclasses of ``base`` that are defined in a module; imported classes are not included."""
    return [
        member
        for member in list_defined_classes(module)
        if issubclass(member, base) and not inspect.isabstract(member) and not member.__name__.startswith("_")
    ]


def collect_classes(package: str, base: type[T]) -> Mapping[str, type[T]]:
    """Return all subclasses of ``base`` by name, from the package and from entry points.

    Raises:
        ValueError: if two classes have the same name.
    """
    classes: dict[str, type[T]] = {}
    members = [member for module in _import_modules(package) for member in list_concrete_classes(module, base)]
    for point in entry_points(group=package):
        loaded = point.load()
        if inspect.isclass(loaded) and issubclass(loaded, base):
            members.append(loaded)
    for member in members:
        registered = classes.setdefault(member.__name__, member)
        if registered is not member:
            raise ValueError(
                f"two classes are called {member.__name__}: {registered.__module__} and {member.__module__}; "
                "rename one class"
            )
    return classes


def list_subclasses(base: type[T]) -> list[type[T]]:
    """Return all concrete subclasses of a base class that are imported so far."""
    descendants = [kind for child in base.__subclasses__() for kind in (child, *list_subclasses(child))]
    return [kind for kind in dict.fromkeys(descendants) if not inspect.isabstract(kind)]


def find_class(name: str, classes: Mapping[str, type[T]], label: str) -> type[T]:
    """Return the class with a name.

    Args:
        name: class name, its kebab-case alias, or ``file.py:Class``.
        classes: the registered classes by name.
        label: the kind of class in the error, such as ``"strategy"``.

    Raises:
        LookupError: if there is no such class; the message lists the most similar names.
    """
    if ".py:" in name:
        return load_from_file(name)
    for class_name, member in classes.items():
        if name in _list_aliases(class_name):
            return member
    raise unknown_name_error(name, sorted(classes), label)


def unknown_name_error(name: str, names: Iterable[str], label: str, cutoff: float = 0.6) -> LookupError:
    """Return the error for an unknown name, with the two most similar names and all names.

    Args:
        name: the unknown name.
        names: the valid names.
        label: the kind of object, such as ``"strategy"``.
        cutoff: smallest similarity, from 0 to 1.
    """
    valid_names = list(names)
    by_lowercase = {valid_name.lower(): valid_name for valid_name in valid_names}
    matches = difflib.get_close_matches(name.lower(), by_lowercase, n=2, cutoff=cutoff)
    hint = f" Did you mean {' or '.join(by_lowercase[match] for match in matches)}?" if matches else ""
    return LookupError(f"no {label} is called {name!r}.{hint} Known: {', '.join(valid_names)}")


def suggest_name(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the hint ``" (did you mean NAME?)"`` with the most similar name, or an empty text if no name is similar.

    Args:
        name: the unknown name.
        names: the valid names.
        cutoff: smallest similarity, from 0 to 1.
    """
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f" (did you mean {matches[0]}?)" if matches else ""


def load_from_file(reference: str) -> Any:
    """Return a class from a Python file of the user.

    Args:
        reference: ``path/to/file.py:Class``.

    Raises:
        LookupError: if the file or the class is missing.
    """
    path, _, class_name = reference.rpartition(":")
    module = load_module(path)
    member = vars(module).get(class_name)
    if not inspect.isclass(member):
        names = [defined.__name__ for defined in list_defined_classes(module)]
        raise LookupError(f"{path} has no class {class_name!r}; it has {', '.join(names) or 'no class at all'}")
    return member


def load_module(path: str) -> ModuleType:
    """Return the module of a Python file of the user, imported only once.

    Args:
        path: the Python file.

    Raises:
        LookupError: if there is no such file, or it cannot be imported.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file() or file.suffix != ".py":
        raise LookupError(f"{path} is not a Python file; write path/to/file.py")
    name = f"{PLUGIN_PREFIX}{file.stem}"
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
