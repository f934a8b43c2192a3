"""Strategies written as calls, ``HiRED(0.4)+FastV(layer=2, budget=0.5)``, and parameters of the parts of a composition.

The form of a call is the form in Python, and ``+`` joins the parts of a composition as its label does. Text needs no
quotes: ``HiRED(0.4, positions=preserve, selection=RandomSelection(seed=3))``.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PART_OPTION = re.compile(r"--reducer((?:\.\w+)*?\.parts\.\d+(?:\.\w+)*)")
"""An option of a part of a composition: ``--reducer.parts.0.budget``."""
UNNUMBERED_PART = re.compile(r"--reducer(\.\w+)*\.parts\.(?!\d+(\.|$))")
"""The beginning of an option that names a part of a composition without its number."""
EXAMPLE = "HiRED(0.4)+FastV(layer=2, budget=0.5)"


@dataclass(frozen=True)
class Call:
    """A class with the values of its parameters; names are not resolved.

    Args:
        name: name of the class or preset.
        args: values of positional parameters.
        kwargs: values of parameters by name.
    """

    name: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def name_arguments(self, cls: type) -> dict[str, Any]:
        """Return all values by the names of the parameters.

        Args:
            cls: the class.

        Raises:
            LookupError: if there are more values than parameters, or a parameter has two values.
        """
        names = list(inspect.signature(cls).parameters)
        if len(self.args) > len(names):
            raise LookupError(
                f"{self.name}(...) has {len(self.args)} values, but the parameters are {', '.join(names)}"
            )
        arguments = dict(zip(names, self.args, strict=False))
        if repeated := [name for name in arguments if name in self.kwargs]:
            raise LookupError(f"{self.name}(...) has two values of {repeated[0]}")
        return {**arguments, **self.kwargs}


def split_plugins(text: str) -> tuple[str, list[str]]:
    """Return a strategy without its file names, and the files: ``file.py:Class`` becomes ``Class``.

    Args:
        text: the name of a strategy, or an expression with such names.
    """
    path, _, name = text.rpartition(":")
    if re.fullmatch(r"[\w.-]+", name) and "(" not in path and ".py:" not in path:
        return name, [path]
    pattern = re.compile(r"([^\s+(),=]+\.py):")
    return pattern.sub("", text), pattern.findall(text)


def is_expression(text: str) -> bool:
    """Return whether a value has the form of a call or of a composition; file names and JSON do not."""
    return bool(re.match(r"\s*([A-Za-z_][\w.-]*\s*[(+]|\+)", text))


def parse_expression(text: str) -> Call:
    """Return the call that a text denotes; a composition is a call of ``Composed``.

    Args:
        text: the text.

    Raises:
        ValueError: if the text has another form.
    """
    is_closed = text.count("(") == text.count(")")
    if text.strip().startswith("+") or (text.strip().endswith("+") and is_closed):
        raise ValueError(f"{text!r}: a strategy is missing before or after +; write {EXAMPLE}")
    try:
        node = ast.parse(_join_kebab_case(text.strip()), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} cannot be read ({error.msg}); write {EXAMPLE}") from error
    parts = [_parse_value(part, text) for part in _list_summands(node)]
    calls = [Call(part) if isinstance(part, str) else part for part in parts]
    if wrong := [part for part in calls if not isinstance(part, Call)]:
        raise ValueError(f"{text!r}: {wrong[0]!r} is no strategy; write {EXAMPLE}")
    return calls[0] if len(calls) == 1 else Call("Composed", kwargs={"parts": calls})


def _join_kebab_case(text: str) -> str:
    """Return a text whose kebab-case names are written with underscores, which are aliases; strings stay unchanged."""
    return re.sub(r"""('[^']*'|"[^"]*")|(?<=[A-Za-z_])-(?=[A-Za-z_])""", lambda match: match[1] or "_", text)


def _list_summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_list_summands(node.left), *_list_summands(node.right)]
    return [node]


def _parse_value(node: ast.expr, text: str) -> Any:
    """Return a value: a name as text, a call, or a literal.

    Raises:
        ValueError: if the value has another form.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        args = [_parse_value(arg, text) for arg in node.args]
        kwargs = {keyword.arg: _parse_value(keyword.value, text) for keyword in node.keywords}
        if None not in kwargs:
            return Call(ast.unparse(node.func), args, {str(name): value for name, value in kwargs.items()})
    if isinstance(node, ast.Name | ast.Attribute):
        return {"true": True, "false": False, "null": None}.get(ast.unparse(node), ast.unparse(node))
    if isinstance(node, ast.List | ast.Tuple):
        return [_parse_value(entry, text) for entry in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"{text!r}: {ast.unparse(node)!r} is neither a name, a call nor a value") from error


def set_part_option(config: Any, option: str, value: Any) -> None:
    """Set a parameter of a part of a composition.

    Args:
        config: the configuration of the strategy, with resolved names; it is changed.
        option: ``--reducer.parts.0.budget``.
        value: the value, with resolved names.

    Raises:
        LookupError: if the strategy has no such part, or a value on the way has no parameters.
    """
    *path, last = option.removeprefix("--reducer.").split(".")
    node = _list_parameters(config)
    for name in path:
        node = _list_parameters(_get_entry(node, name, option))
    if isinstance(node, dict):
        node[last] = value
    else:
        _get_entry(node, last, option)
        node[int(last)] = value


def _list_parameters(node: Any) -> Any:
    """Return the parameters of a configured class, or the value itself."""
    return node.setdefault("init_args", {}) if isinstance(node, dict) and "class_path" in node else node


def _get_entry(node: Any, name: str, option: str) -> Any:
    """Return the entry of a mapping or of a list of parts; the option is named in the error."""
    if isinstance(node, list) and name.isdigit() and int(name) < len(node):
        return node[int(name)]
    if isinstance(node, dict) and isinstance(node.get(name), dict | list):
        return node[name]
    if isinstance(node, list):
        raise LookupError(f"{option}: the composition has the parts 0 to {len(node) - 1}")
    if name == "parts":
        raise LookupError(f"{option}: --reducer is no composition; write --reducer '{EXAMPLE}'")
    raise LookupError(
        f"{option}: {name} is no class with parameters; give its value, such as {{amount: 0.2, per: tile}}"
    )
