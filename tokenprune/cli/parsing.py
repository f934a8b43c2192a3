"""From words on the command line to configured objects: names, presets, user files, and errors of one line.

jsonargparse does the work on the plain dataclasses. What is added: class names may be written in kebab case, a preset
(`HiRED.release`) or a user's class (`file.py:Class`) may stand for a class, and options may come in any order.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import yaml

from tokenprune.catalog import components, strategies
from tokenprune.configuration import as_config, import_path
from tokenprune.policies import Component, Configurable
from tokenprune.reducer import TokenReducer
from tokenprune.registry import concrete_classes, load_from_file, load_module, lookup

T = TypeVar("T")
Named: TypeAlias = tuple[type[Configurable], Mapping[str, type[Configurable]]]
"""A base class and the known classes by name."""


def presets(strategy: type[TokenReducer]) -> list[str]:
    """Return the names of a strategy's presets: its own public class methods."""
    own = [name for base in strategy.__mro__ if issubclass(base, TokenReducer) for name in vars(base)]
    return sorted({n for n in own if isinstance(vars(strategy).get(n), classmethod) and not n.startswith("_")})


def with_defaults(found: type) -> str:
    """Return a class with the defaults of its fields as JSON.

    All of them are written out, since jsonargparse hands parameters of the class before on to one that replaces it.
    """
    if not dataclasses.is_dataclass(found):
        return import_path(found)
    defaults = {}
    for field in dataclasses.fields(found):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = as_config(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = as_config(field.default_factory())
    return json.dumps({"class_path": import_path(found), "init_args": defaults})


def imported(name: str, base: type[T]) -> type[T] | None:
    """Return the class of a dotted import path; None if it is none, which jsonargparse reports."""
    module, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), class_name, None)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, type) and issubclass(found, base) else None


def is_given_whole(name: str) -> bool:
    """Whether a value is something that jsonargparse takes by itself: JSON, a file, or a dotted import path."""
    module = name.rpartition(".")[0]
    return (
        name.lstrip().startswith("{")
        or name.endswith((".yaml", ".yml", ".json"))
        or "." in module
        or module in sys.modules
    )


def resolve_strategy(name: str, known: Mapping[str, type[TokenReducer]]) -> str:
    """Return what jsonargparse understands for the name of a strategy.

    Args:
        name: class name, alias, or preset (`Class.preset`).
        known: strategies by class name.

    Raises:
        LookupError: if there is no such strategy or preset.
    """
    if is_given_whole(name):
        given = imported(name, TokenReducer)  # type: ignore[type-abstract]
        return with_defaults(given) if given else name
    head, _, preset = name.partition(".")
    found = lookup(head, known, "strategy")
    if not preset:
        return with_defaults(found)
    if preset not in presets(found):
        have = ", ".join(presets(found)) or "none"
        raise LookupError(f"{found.__name__} has no preset {preset!r}; it has: {have}")
    return json.dumps(as_config(getattr(found, preset)()))


def resolve_component(name: str, known: Mapping[str, type[Configurable]], what: str = "component") -> str:
    """Return what jsonargparse understands for the name of a component, or of something else configurable.

    Args:
        name: class name or alias.
        known: components by class name.
        what: what is looked for, for the error.

    Raises:
        LookupError: if there is no such component.
    """
    if is_given_whole(name):
        given = imported(name, Configurable)
        return with_defaults(given) if given else name
    return with_defaults(lookup(name, known, what))


def component_fields(known: Iterable[type]) -> set[str]:
    """Return the names of all fields of strategies and components that hold a component."""
    hints = [hint for one in known for hint in get_type_hints(one).items()]
    return {
        name
        for name, hint in hints
        for kind in (hint, *get_args(hint))
        if isinstance(kind, type) and issubclass(kind, Component)
    }


def field_words(known: Iterable[type]) -> dict[str, set[str]]:
    """Return the words that may stand in a field instead of a component, by name of the field."""
    words: dict[str, set[str]] = {}
    for one in known:
        for name, hint in get_type_hints(one).items():
            for kind in get_args(hint):
                if get_origin(kind) is Literal:
                    words.setdefault(name, set()).update(map(str, get_args(kind)))
    return words


def with_plugins(plugins: Iterable[str]) -> tuple[dict[str, type[TokenReducer]], dict[str, type[Component]]]:
    """Return strategies and components by name, those in a user's files included.

    Args:
        plugins: Python files.

    Raises:
        LookupError: if a file cannot be imported, or a class in it has the name of another one.
    """
    known, parts = dict(strategies()), dict(components())
    for module in dict.fromkeys(load_module(plugin) for plugin in plugins):
        _join(known, module, TokenReducer)  # type: ignore[type-abstract]
        _join(parts, module, Component)
    return known, parts


def _join(names: dict[str, type[T]], module: ModuleType, base: type[T]) -> None:
    for found in concrete_classes(module, base):
        other = names.setdefault(found.__name__, found)
        if other is not found:
            raise LookupError(
                f"two classes are called {found.__name__}: {module.__file__} and {other.__module__}; rename one"
            )


def grouped(argv: Sequence[str]) -> list[list[str]]:
    """Split arguments into options with their values: `[["--image", "a.png", "b.png"], ["--json"]]`."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            if option.startswith("--reducer."):  # parameters may be written in kebab case, as classes may
                option = "--" + option[2:].replace("-", "_")
            groups.append([option, value] if equals else [option])
        elif groups:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def prepare(argv: Sequence[str], more: Mapping[str, Named] | None = None) -> list[str]:
    """Return the arguments in the form and order that jsonargparse wants.

    User files are loaded and noted with `--plugin`, so that a printed config can be read again; names are resolved; and
    whatever the order they were written in, options override the config file and parents come before their children.

    Args:
        argv: the words after the command.
        more: what else than `--reducer` is given by class name: option without dashes to its base class and the known
            classes.

    Raises:
        LookupError: if a name is not known or a file cannot be imported.
    """
    groups, plugins = grouped(argv), []
    for group in groups:
        option, values = group[0], group[1:]
        if option == "--plugin":
            plugins += values
        elif option == "--config" and values:
            plugins += content_of(values[0]).get("plugin") or []
        elif option.startswith("--reducer") and len(values) == 1 and ".py:" in values[0]:
            path, _, group[1] = values[0].rpartition(":")
            load_from_file(f"{path}:{group[1].partition('.')[0]}")  # a wrong name is answered with those of the file
            plugins.append(path)
    known, parts = with_plugins(plugins)
    others = {option: dict(found) for option, (_, found) in (more or {}).items()}
    for module in dict.fromkeys(load_module(plugin) for plugin in plugins):
        for option, (base, _) in (more or {}).items():
            _join(others[option], module, base)
    every = [*known.values(), *parts.values()]
    fields, words = component_fields(every), field_words(every)

    def resolved(value: Any, key: str) -> Any:
        """Resolve names in a value of a strategy's configuration: `reducer`, or the name of a field."""
        if isinstance(value, str) and key in others:
            return resolve_component(value, others[key], key)
        if isinstance(value, str) and value in words.get(key, ()):
            return value
        if isinstance(value, str) and (key == "reducer" or key in fields):
            if key == "reducer":
                return resolve_strategy(value, known)
            try:
                return resolve_component(value, parts)
            except LookupError as error:
                also = f"{key} takes {', '.join(sorted(words[key]))} or a component; " if key in words else ""
                raise LookupError(f"{also}{error}") from error
        if isinstance(value, dict) and "class_path" in value:
            whole = resolved(value["class_path"], key)
            whole = json.loads(whole) if whole.startswith("{") else {"class_path": whole}
            own = {name: resolved(given, name) for name, given in (value.get("init_args") or {}).items()}
            return {**whole, "init_args": {**whole.get("init_args", {}), **own}}
        return value

    for group in groups:
        if group[0].startswith("--reducer.") and group[1:] == ["None"]:  # as W&B's agent writes null
            group[1] = "null"
        key = group[0].removeprefix("--")
        key = key.rpartition(".")[2] if key.startswith("reducer.") else key
        if len(group) != 2 or group[1] == "null":
            continue
        if key == "reducer" or key in fields or key in others:
            given = _mapping(group[1]) if group[1].lstrip().startswith("{") else group[1]
            found = resolved(given, key)
            group[1] = found if isinstance(found, str) else json.dumps(found)
        elif key == "config" and {"reducer", *others} & set(content := content_of(group[1])):
            for name in {"reducer", *others} & set(content):
                found = resolved(content[name], name)
                content[name] = json.loads(found) if isinstance(found, str) and found.startswith("{") else found
            group[1] = json.dumps(content)
    groups = [group for group in groups if group[0] != "--plugin"]
    for option in ("--image", "--question"):  # given several times, they add up
        values = [value for group in groups if group[0] == option for value in group[1:]]
        groups = [group for group in groups if group[0] != option] + ([[option, *values]] if values else [])
    groups.sort(key=lambda group: -1 if group[0] == "--config" else group[0].startswith("--") * group[0].count("."))
    if plugins:
        groups.append(["--plugin", json.dumps(list(dict.fromkeys(plugins)))])
    return [word for group in groups for word in group]


def _mapping(text: str) -> Any:
    """Return a mapping that is written as JSON, YAML or, as W&B's agent does, in Python's own way."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return yaml.safe_load(text)


def content_of(config: str) -> dict[str, Any]:
    """Return what a YAML file says; nothing if it is not there or not a mapping, which jsonargparse reports."""
    file = Path(config)
    content = yaml.safe_load(file.read_text()) if file.is_file() else None
    return content if isinstance(content, dict) else {}


def format_error(error: BaseException, options: Iterable[str] = ()) -> str:
    """Return an error as one line that names the place, what was wrong, and the nearest valid name.

    Args:
        error: what was raised.
        options: all valid option names, for a misspelt one.
    """
    text = str(error) or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    keys = re.findall(r'Parser key "([\w.]+)"', text)
    message = lines[-1] if keys and len(lines) > 1 else re.sub(r'^Parser key "[\w.]+":\s*', "", " ".join(lines))
    if match := re.search(r"Option '([\w.]+)' is not accepted", text):
        classes = re.findall(r"class_path '([\w.]+)'", text)
        message = f"there is no parameter {match[1]!r}"
        if classes:
            module, _, name = classes[-1].rpartition(".")
            fields = [field.name for field in dataclasses.fields(getattr(importlib.import_module(module), name))]
            message += f" of {name}{_nearest(match[1].split('.')[0], fields)}; it has {', '.join(fields)}"
    elif match := re.search(r"[Uu]nrecognized arguments: (--[\w.-]+)", text):
        message = f"there is no option {match[1]}{_nearest(match[1], options)}"
    elif (kinds := re.search(r"Subtypes: \[(.*)\]", text)) and (given := re.search(r"Given value: (.*)", text)):
        message = f"{given[1]!r} is not valid; give {_readable(kinds[1])}"
    elif match := re.search(r"Expected a (typing\.Literal\S*.*?|<class '\w+'>)\. Got value: (.*)", text):
        message = f"{match[2]!r} is not valid; give {_readable(match[1])}"
    place = "--" + (keys[0].replace("_", "-") if len(keys) == 1 else ".".join(keys)) + ": " if keys else ""
    return place + message


def _readable(types: str) -> str:
    """Say a list of types in the words of a command line."""
    words = {"<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'str'>": "text"}
    for written, word in words.items():
        types = types.replace(written, word)
    types = types.replace("<class 'NoneType'>", "null")
    types = re.sub(r"<class '[\w.]*\.Budget'>", "a Budget such as {amount: 0.2, per: tile}", types)
    types = re.sub(r"<class '[\w.]*\.(\w+)'>", r"a \1", types)
    types = re.sub(r"list\[.*\]", "a list of these", types)
    types = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", types)
    return " or ".join(part.strip() for part in re.split(r",\s*(?![^{]*\})", types))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
