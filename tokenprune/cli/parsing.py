"""Prepares command-line arguments for jsonargparse, and formats its errors as one line.

jsonargparse parses the arguments into plain dataclasses. This module adds class names in kebab case, presets
(`HiRED.release`) and user classes (`file.py:Class`) in place of a class name, compositions of strategies
(`HiRED(0.4)+FastV()`), and options in any order.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import yaml

from tokenprune.catalog import WRAPPERS, components, find_kind, strategies
from tokenprune.cli.expressions import (
    PART_OPTION,
    UNNUMBERED_PART,
    Call,
    is_expression,
    parse_expression,
    set_part_option,
    split_plugins,
)
from tokenprune.configuration import as_config, import_path
from tokenprune.policies import Component, Configurable
from tokenprune.reducer import TokenReducer
from tokenprune.registry import (
    find_class,
    list_concrete_classes,
    list_defined_classes,
    load_from_file,
    load_module,
    suggest_name,
)
from tokenprune.source_code import describe_abstract_class, locate_class

T = TypeVar("T")
ClassOption: TypeAlias = tuple[type[Configurable], Mapping[str, type[Configurable]]]
"""A base class, and its classes by name."""
SYNONYMS: Mapping[str, Sequence[str]] = {
    "--strategy": ("--reducer", "--reducers", "--names"),
    "--strategies": ("--reducers", "--reducer", "--names"),
    "--method": ("--reducer", "--reducers", "--names"),
    "--reducer": ("--reducers", "--names"),
    "--reducers": ("--reducer", "--names"),
    "--budgets": ("--budget", "--reducer.budget"),
    "--ratio": ("--budget", "--reducer.budget"),
    "--prompt": ("--question",),
    "--questions": ("--question",),
    "--images": ("--image",),
    "--dataset": ("--task",),
    "--output": ("--out",),
    "--output-dir": ("--out",),
}
"""Options with the same meaning as an unknown option, the most likely first."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Suffixes of image files, for hints."""


def presets(strategy: type[TokenReducer]) -> list[str]:
    """Return the names of a strategy's presets, which are its own public class methods, sorted."""
    names = [name for base in strategy.__mro__ if issubclass(base, TokenReducer) for name in vars(base)]
    return sorted({n for n in names if isinstance(vars(strategy).get(n), classmethod) and not n.startswith("_")})


def format_class(cls: type) -> str:
    """Return a class with the defaults of its fields as JSON; its import path if it is no dataclass.

    All defaults are included, since jsonargparse passes parameters of a replaced class to the new class.
    """
    if not dataclasses.is_dataclass(cls):
        return import_path(cls)
    defaults = {}
    for field in (field for field in dataclasses.fields(cls) if field.init):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = as_config(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = as_config(field.default_factory())
    return json.dumps({"class_path": import_path(cls), "init_args": defaults})


def import_class(name: str, base: type[T]) -> type[T] | None:
    """Return the class of a dotted import path; None if there is none, and jsonargparse reports the error."""
    module, _, class_name = name.rpartition(".")
    try:
        member = getattr(importlib.import_module(module), class_name, None)
    except (ImportError, ValueError):
        return None
    return member if isinstance(member, type) and issubclass(member, base) else None


def is_resolved(name: str) -> bool:
    """Return whether jsonargparse can read a value without a name lookup: JSON, a file, or a dotted import path."""
    module = name.rpartition(".")[0]
    return (
        name.lstrip().startswith("{")
        or name.endswith((".yaml", ".yml", ".json"))
        or "." in module
        or module in sys.modules
    )


def resolve_strategy(name: str, classes: Mapping[str, type[TokenReducer]]) -> str:
    """Return the value for jsonargparse of the name of a strategy.

    Args:
        name: class name, alias, or preset (`Class.preset`).
        classes: strategies by class name.

    Raises:
        LookupError: if there is no such strategy or preset.
    """
    if is_resolved(name):
        cls = import_class(name, TokenReducer)
        return format_class(cls) if cls else name
    class_name, _, preset = name.partition(".")
    strategy = find_class(class_name, classes, "strategy")
    if not preset:
        return format_class(strategy)
    if preset not in presets(strategy):
        names = ", ".join(presets(strategy)) or "none"
        raise LookupError(f"{strategy.__name__} has no preset {preset!r}; it has: {names}")
    return json.dumps(as_config(getattr(strategy, preset)()))


def resolve_component(name: str, classes: Mapping[str, type[Configurable]], kind: str = "component") -> str:
    """Return the value for jsonargparse of the name of a component, or of another configurable class.

    Args:
        name: class name or alias.
        classes: components by class name.
        kind: kind of class, for the error.

    Raises:
        LookupError: if there is no such component.
    """
    if is_resolved(name):
        cls = import_class(name, Configurable)
        return format_class(cls) if cls else name
    return format_class(find_class(name, classes, kind))


@cache
def read_hints(cls: type) -> Mapping[str, Any]:
    """Return the types of the fields of a class by name; evaluated once per class."""
    return get_type_hints(cls)


def collect_fields(classes: Iterable[type], base: type) -> set[str]:
    """Return the names of all fields of strategies and components that hold an object of a class, or several.

    Args:
        classes: strategies and components.
        base: the class, `Component` or `TokenReducer`.
    """
    hints = [hint for cls in classes for hint in read_hints(cls).items()]
    return {
        name
        for name, hint in hints
        for kind in (hint, *get_args(hint))
        if isinstance(kind, type) and issubclass(kind, base)
    }


def collect_literals(classes: Iterable[type]) -> dict[str, set[str]]:
    """Return the literal values that a field accepts instead of a component, by field name."""
    literals: dict[str, set[str]] = {}
    for cls in classes:
        for name, hint in read_hints(cls).items():
            for kind in (hint, *get_args(hint)):
                if get_origin(kind) is Literal:
                    literals.setdefault(name, set()).update(map(str, get_args(kind)))
    return literals


def load_classes(plugins: Iterable[str]) -> tuple[dict[str, type[TokenReducer]], dict[str, type[Component]]]:
    """Return strategies and components by name, with the classes of plug-in files.

    Args:
        plugins: Python files.

    Raises:
        LookupError: if a file cannot be imported, or two classes have the same name.
    """
    strategy_classes, component_classes = {**strategies(), **WRAPPERS}, dict(components())
    for module in dict.fromkeys(load_module(plugin) for plugin in plugins):
        _add_classes(strategy_classes, module, TokenReducer)
        _add_classes(component_classes, module, Component)
    return strategy_classes, component_classes


def _add_classes(classes: dict[str, type[T]], module: ModuleType, base: type[T]) -> None:
    for cls in list_concrete_classes(module, base):
        existing = classes.setdefault(cls.__name__, cls)
        if existing is not cls:
            raise LookupError(
                f"two classes are called {cls.__name__}: {module.__file__} and {existing.__module__}; rename one"
            )


def check_user_class(cls: type, base: type | None) -> None:
    """Check that a class can be the value of an option.

    Args:
        cls: the class.
        base: the base class of the values of the option; None for options without classes.

    Raises:
        LookupError: if the class has another base class, or lacks a method.
    """
    if base is None:
        return
    place, kind = locate_class(cls), find_kind(cls)
    if not issubclass(cls, base) and kind != "other":
        label = {"saliency model": "attention"}.get(kind, kind)
        raise LookupError(
            f"{cls.__name__} is a component ({kind}), not a strategy{place}; use it inside a strategy: --reducer HiRED "
            f"--reducer.{label} {cls.__name__}"
        )
    if not issubclass(cls, base):
        raise LookupError(f"{cls.__name__} is no subclass of {base.__name__}{place}")
    if fault := describe_abstract_class(cls):
        raise LookupError(fault)


def describe_file(path: str) -> str:
    """Return the error for a file without a class as the value of an option, with the classes of the file.

    Args:
        path: the file.
    """
    names = [cls.__name__ for cls in list_defined_classes(load_module(path)) if issubclass(cls, Configurable)]
    if not names:
        return f"{path} has no strategy and no component; write a class, and name it as {path}:Class"
    return f"{path} is a file; name its class: {' or '.join(f'{path}:{name}' for name in names)}"


def group_options(argv: Sequence[str]) -> list[list[str]]:
    """Split arguments into options with their values: `[["--image", "a.png", "b.png"], ["--json"]]`.

    ``--budget`` becomes ``--reducer.budget``, and ``--budget.per`` becomes ``--reducer.budget.per``.
    """
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            if option.split(".")[0] == "--budget":
                option = f"--reducer.{option[2:]}"
            if option.startswith("--reducer."):  # parameters may be written in kebab case, too
                option = "--" + option[2:].replace("-", "_")
            groups.append([option, value] if equals else [option])
        elif groups:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def prepare_arguments(argv: Sequence[str], options: Mapping[str, ClassOption] | None = None) -> list[str]:
    """Return the arguments in the form and order that jsonargparse requires.

    User files are loaded and added as `--plugin`, so that a printed config can be read again. Names are resolved.
    Arguments are sorted so that options override the config file, and parents precede their children.

    Args:
        argv: the arguments after the command.
        options: further options with class names as values: option without dashes to its base class and classes.

    Raises:
        LookupError: if there is no class of a name, or a file cannot be imported.
    """
    groups, plugins = group_options(argv), []
    for group in groups:
        option, values = group[0], group[1:]
        if option == "--plugin":
            plugins += values
        elif option == "--config" and values:
            plugins += read_yaml(values[0]).get("plugin") or []
        elif option.startswith("--reducer") and len(values) == 1 and values[0].endswith(".py"):
            raise LookupError(describe_file(values[0]))
        elif option.startswith("--reducer") and len(values) == 1 and ".py:" in values[0]:
            group[1], paths = split_plugins(values[0])
            plugins += paths
            if not is_expression(group[1]):
                load_from_file(f"{paths[0]}:{group[1].partition('.')[0]}")  # raises if the name is wrong
    strategy_classes, component_classes = load_classes(plugins)
    option_classes = {option: dict(by_name) for option, (_, by_name) in (options or {}).items()}
    modules = list(dict.fromkeys(load_module(plugin) for plugin in plugins))
    user_classes = {cls.__name__: cls for module in modules for cls in list_defined_classes(module)}
    for module in modules:
        for option, (base, _) in (options or {}).items():
            _add_classes(option_classes[option], module, base)
    classes = [*strategy_classes.values(), *component_classes.values()]
    fields, literals = collect_fields(classes, Component), collect_literals(classes)
    strategy_fields = {"reducer", *collect_fields(classes, TokenReducer)}

    def resolve(value: Any, key: str) -> Any:
        """Return a value of a configuration with names resolved; `key` is an option or the name of a field."""
        if isinstance(value, str) and (cls := user_classes.get(value.partition(".")[0])):
            bases = {**dict.fromkeys(fields, Component), **dict.fromkeys(strategy_fields, TokenReducer)}
            check_user_class(cls, {**bases, **{option: base for option, (base, _) in (options or {}).items()}}.get(key))
        if isinstance(value, str) and key in option_classes:
            return parse_json(resolve_component(value, option_classes[key], key))
        if isinstance(value, str) and value in literals.get(key, ()):
            return value
        if isinstance(value, str) and key in {*strategy_fields, *fields} and is_expression(value):
            return resolve(parse_expression(value), key)
        if isinstance(value, str) and key in strategy_fields:
            if value in component_classes:
                check_user_class(component_classes[value], TokenReducer)
            return parse_json(resolve_strategy(value, strategy_classes))
        if isinstance(value, str) and key in fields:
            try:
                return parse_json(resolve_component(value, component_classes))
            except LookupError as error:
                hint = f"{key} takes {', '.join(sorted(literals[key]))} or a component; " if key in literals else ""
                raise LookupError(f"{hint}{error}") from error
        if isinstance(value, Call):
            base = resolve(value.name, key)
            cls = import_class(base["class_path"] if isinstance(base, dict) else base, Configurable)
            arguments = value.kwargs if cls is None else value.name_arguments(cls)
            return resolve({"class_path": value.name, "init_args": arguments}, key)
        if isinstance(value, dict) and "class_path" in value:
            base = resolve(value["class_path"], key)
            config = base if isinstance(base, dict) else {"class_path": base}
            init_args = {name: resolve(entry, name) for name, entry in (value.get("init_args") or {}).items()}
            return {**config, "init_args": {**config.get("init_args", {}), **init_args}}
        if isinstance(value, list):
            return [resolve(entry, key) for entry in value]
        return value

    if unnumbered := next((group[0] for group in groups if UNNUMBERED_PART.match(group[0])), None):
        raise LookupError(f"{unnumbered}: the parts of a composition have numbers; write --reducer.parts.0.budget")
    part_options = [group for group in groups if PART_OPTION.fullmatch(group[0]) and len(group) == 2]
    groups = [group for group in groups if group not in part_options]
    content: dict[str, Any] = {}
    for group in groups:
        if group[0].startswith("--reducer.") and group[1:] == ["None"]:  # the W&B agent writes null as None
            group[1] = "null"
        key = group[0].removeprefix("--")
        key = key.rpartition(".")[2] if key.startswith("reducer.") else key
        if len(group) != 2 or group[1] == "null":
            continue
        if key in {*strategy_fields, *fields, *option_classes}:
            group[1] = format_json(resolve(parse_mapping(group[1]), key))
        elif key == "config" and {"reducer", *option_classes} & set(content := read_yaml(group[1])):
            for name in {"reducer", *option_classes} & set(content):
                content[name] = resolve(content[name], name)
            group[1] = json.dumps(content)
    if part_options:
        group = next((group for group in groups if group[0] == "--reducer"), ["--reducer"])
        config = parse_json(group[1]) if len(group) == 2 else content.get("reducer")
        for option, text in part_options:
            last = option.rpartition(".")[2]
            key = "reducer" if last.isdigit() else last
            value = parse_mapping(text)
            value = (
                yaml.safe_load(value) if isinstance(value, str) and key not in {*strategy_fields, *fields} else value
            )
            set_part_option(config, option, resolve(value, key))
        groups = [*(other for other in groups if other[0] != "--reducer"), ["--reducer", json.dumps(config)]]
    groups = [group for group in groups if group[0] != "--plugin"]
    for option in ("--image", "--question"):  # several occurrences are joined
        values = [value for group in groups if group[0] == option for value in group[1:]]
        groups = [group for group in groups if group[0] != option] + ([[option, *values]] if values else [])
    groups.sort(key=lambda group: -1 if group[0] == "--config" else group[0].startswith("--") * group[0].count("."))
    if plugins:
        groups.append(["--plugin", *dict.fromkeys(plugins)])
    return [word for group in groups for word in group]


def parse_mapping(text: str) -> Any:
    """Return a mapping or list written as JSON, as YAML or, by the W&B agent, as a Python literal; else the text."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return yaml.safe_load(text)


def parse_json(text: str) -> Any:
    """Return the object of a JSON text; a text that is no object is returned unchanged."""
    return json.loads(text) if text.startswith("{") else text


def format_json(value: Any) -> str:
    """Return a value as JSON; a text is returned unchanged."""
    return value if isinstance(value, str) else json.dumps(value)


def read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping in a YAML file; empty if there is no file or no mapping, which jsonargparse reports."""
    file = Path(path)
    content = yaml.safe_load(file.read_text()) if file.is_file() else None
    return content if isinstance(content, dict) else {}


def format_error(error: BaseException, options: Iterable[str] = ()) -> str:
    """Return an error as one line with the option, the fault and the most similar valid name.

    Args:
        error: the error.
        options: all valid option names, to correct a misspelt name.
    """
    text = str(error) or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    keys = re.findall(r'Parser key "([\w.]+)"', text)
    message = lines[-1] if keys and len(lines) > 1 else re.sub(r'^Parser key "[\w.]+":\s*', "", " ".join(lines))
    if match := re.search(r"Option '([\w.]+)' is not accepted", text):
        classes = re.findall(r"class_path '([\w.]+)'", text)
        parameter = match[1].split(".")[0]
        message = f"there is no parameter {parameter!r}"
        if classes:
            module, _, name = classes[-1].rpartition(".")
            cls = getattr(importlib.import_module(module), name)
            fields = [field.name for field in dataclasses.fields(cls) if field.init]
            has_schedule = parameter == "layer" and "schedule" in fields
            hint = " (write its cuts as schedule=[[2, 0.5]])" if has_schedule else suggest_name(parameter, fields, 0.5)
            message += f" of {name}{hint}; it has {', '.join(fields)}"
            message += "; a part has its own parameters: --reducer.parts.0.budget" if fields == ["parts"] else ""
            message += "; the strategy at the cut has its own: --reducer.reducer.budget" if "reducer" in fields else ""
    elif match := re.search(r"[Uu]nrecognized arguments: (--[\w.-]+)", text):
        message = f"there is no option {match[1]}{suggest_option(match[1], list(options))}"
    elif match := re.search(r"[Uu]nrecognized arguments: (.+)", text):
        message = f"unexpected argument {match[1]!r}{suggest_file_option(match[1], list(options))}"
    elif (kinds := re.search(r"Subtypes: \[(.*)\]", text)) and (value := re.search(r"Given value: (.*)", text)):
        message = f"{value[1]!r} is not valid; give {_describe_types(kinds[1])}"
    elif match := re.search(r"Expected a tuple with (\d+) elements. Got value: (.*)", text):
        message = f"{match[2]} is not valid; give lists of {match[1]} values, such as [[2, 0.5]]"
    elif match := re.search(r"Expected a (typing\.Literal\S*.*?|<class '\w+'>)\. Got value: (.*)", text):
        message = f"{match[2]!r} is not valid; give {_describe_types(match[1])}"
    prefix = "--" + (keys[0].replace("_", "-") if len(keys) == 1 else ".".join(keys)) + ": " if keys else ""
    return prefix + message


def suggest_option(option: str, options: Sequence[str]) -> str:
    """Return a hint to the option of the same meaning or, without one, to the option with the most similar name.

    Args:
        option: the unknown option.
        options: all valid options.
    """
    root, _, parameter = option.partition(".")
    meanings = [f"{name}.{parameter}" if parameter else name for name in SYNONYMS.get(root, ())]
    known = [name for name in meanings if name.split(".")[0] in options]
    return f" (did you mean {known[0]}?)" if known else suggest_name(option, options, 0.7)


def suggest_file_option(argument: str, options: Sequence[str]) -> str:
    """Return a hint to the option for a file that was given without an option; empty if there is no such option.

    Args:
        argument: the unexpected argument.
        options: all valid options.
    """
    suffix = Path(argument).suffix.lower()
    option = "--config" if suffix in (".yaml", ".yml") else "--image" if suffix in IMAGE_SUFFIXES else ""
    return f" (did you mean {option} {argument}?)" if option in options else ""


def _describe_types(types: str) -> str:
    """Return a list of types from an error of jsonargparse as plain words."""
    labels = {"<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'str'>": "text"}
    for type_name, label in labels.items():
        types = types.replace(type_name, label)
    types = types.replace("<class 'NoneType'>", "null")
    types = re.sub(r"<class '[\w.]*\.Budget'>", "a Budget such as {amount: 0.2, per: tile}", types)
    types = re.sub(r"<class '[\w.]*\.(\w+)'>", r"a \1", types)
    types = re.sub(r"list\[.*\]", "a list of these", types)
    types = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", types)
    described = " or ".join(part.strip() for part in re.split(r",\s*(?![^{]*\})", types))
    return described.replace("<class 'tuple'>", "a list in brackets, such as [[2, 0.5]]")
