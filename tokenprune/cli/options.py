"""Options of a command, defined once as the fields of a dataclass.

The dataclass is the configuration that the command runs with and records. Each field is an option: its annotation is
the type, its default the default, and its entry under ``Args:`` in the docstring the help.
"""

from __future__ import annotations

import re
from argparse import Action
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from tokenprune.cli.errors import INPUT_ERRORS, user_error
from tokenprune.cli.parsing import ClassOption, prepare_arguments
from tokenprune.configuration import as_config
from tokenprune.policies import Configurable
from tokenprune.reducer import TokenReducer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
BUDGET_HELP = (
    "--budget is short for --reducer.budget: 0.2 or 20% (ratios; 1.0 or 100% keeps all tokens), 160 (tokens; 1 keeps "
    "one token)"
)
"""The help of the budget of a strategy."""


class OptionFormatter(DefaultHelpFormatter):
    """Formats the help: a class as the value of an option is its name, and the classes that exist are not listed."""

    def _get_help_string(self, action: Action) -> str:
        """Return the help of an option; jsonargparse would add the parameters of the default class."""
        if isinstance(action.default, Namespace) and "class_path" in action.default:
            return f"{action.help} (default: {action.default.class_path.rpartition('.')[2]})"
        return re.sub(r", known subclasses: [^)]*", "", super()._get_help_string(action))


def build_parser(prog: str, description: str, *configs: type[DataclassInstance], file: bool = False) -> ArgumentParser:
    """Return a parser with one option for each field of some dataclasses; it raises errors instead of exiting.

    Args:
        prog: the command.
        description: the purpose of the command, for the help.
        configs: the dataclasses.
        file: whether ``--config FILE`` reads options from a YAML file.
    """
    parser = ArgumentParser(
        prog=prog, exit_on_error=False, allow_abbrev=False, description=description, formatter_class=OptionFormatter
    )
    if file:
        parser.add_argument("--config", action="config", help="YAML file with any of these options")
    for config in configs:
        hints, texts = get_type_hints(config), read_field_docs(config)
        for option in fields(config):
            add_option(parser, option, hints[option.name], texts[option.name])
    return parser


def read_field_docs(config: type) -> dict[str, str]:
    """Return the text of each entry under ``Args:`` in the docstring of a dataclass and of its base classes."""
    entries = [entry for cls in reversed(config.__mro__) for entry in docstring_parser.parse(cls.__doc__ or "").params]
    texts = {entry.arg_name: " ".join((entry.description or "").replace("``", "").split()) for entry in entries}
    return {name: text if text.endswith("..") else text.removesuffix(".") for name, text in texts.items()}


def add_option(parser: ArgumentParser, option: Field[Any], hint: Any, text: str) -> None:
    """Add the option of a field: ``--NAME`` in kebab case, or a positional argument if the field has no default.

    Args:
        parser: the parser.
        option: the field; its metadata holds further arguments of ``ArgumentParser.add_argument``.
        hint: the type of the field.
        text: the help.
    """
    default = option.default if option.default_factory is MISSING else option.default_factory()
    arguments = {"help": text, **({} if "choices" in option.metadata else describe_type(hint)), **option.metadata}
    if default is MISSING:
        parser.add_argument(option.name, **arguments)
        return
    if isinstance(default, Configurable):
        arguments["help"] = f"{text}; parameters follow as --{option.name}.NAME"
    if option.name == "reducer":
        arguments["help"] += f"; {BUDGET_HELP}"
    parser.add_argument(f"--{option.name.replace('_', '-')}", default=as_config(default), **arguments)


def describe_type(hint: Any) -> dict[str, Any]:
    """Return the arguments of ``ArgumentParser.add_argument`` for a type.

    Lists and tuples are written as several words (``--sizes 336x336 672x672``), which jsonargparse's own options of a
    dataclass do not accept. ``--NAME`` turns a flag on, and a YAML file can set it.
    """
    kinds = get_args(hint)
    if NoneType in kinds:
        return describe_type(Union[tuple(kind for kind in kinds if kind is not NoneType)])  # noqa: UP007
    if hint is bool:
        return {"type": bool, "nargs": "?", "const": True}
    if get_origin(hint) is Literal:
        return {"choices": list(kinds)}
    if get_origin(hint) is list:
        return {"type": kinds[0], "nargs": "+"}
    if get_origin(hint) is tuple:
        return {"type": kinds[0], "nargs": len(kinds)}
    return {"type": hint}


def parse_options(parser: ArgumentParser, argv: Sequence[str], classes: Mapping[str, ClassOption] | None = None) -> Any:
    """Return the parsed options of a command, with class names resolved and objects built.

    Args:
        parser: the parser of the command.
        argv: the arguments after the command.
        classes: if the command has options with class names as values, these options except ``--reducer``, as in
            `prepare_arguments`; None if it has none.

    Raises:
        UserError: if an option is not valid.
    """
    try:
        arguments = list(argv) if classes is None else prepare_arguments(argv, classes)
        return parser.instantiate(parser.parse_args(arguments))
    except INPUT_ERRORS as error:
        raise user_error(error, parser) from error


def select_fields(config: type[Config], options: Any) -> Config:
    """Return a dataclass whose fields have the values of the parsed options."""
    return config(**{option.name: getattr(options, option.name) for option in fields(config)})


@dataclass(frozen=True)
class ReducerConfig:
    """Options that name a strategy.

    Args:
        plugin: Python files with further strategies.
        reducer: strategy, if it is not given as NAME.
    """

    plugin: list[str] = field(default_factory=list)
    reducer: TokenReducer | None = None


def parse_reducer(argv: Sequence[str]) -> TokenReducer:
    """Return the strategy of a command line with the options ``--plugin``, ``--reducer`` and ``--reducer.NAME``.

    Raises:
        UserError: if a name, a parameter or a value is not valid.
    """
    return parse_options(build_parser("tokenprune", "", ReducerConfig), argv, {}).reducer
