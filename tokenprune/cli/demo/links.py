"""Links that open the page with the same question and choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any
from urllib.parse import urlencode

from tokenprune.cli.demo.choices import NONE, Choice, list_components, list_strategies
from tokenprune.policies import AllocationPolicy, SelectionPolicy


@dataclass(frozen=True)
class PageState:
    """The values on the page, without the image: a link cannot contain an uploaded file.

    Args:
        question: the question; empty for the first question of the page.
        is_compared: whether the second strategy also answers.
        first: the first strategy.
        second: the second strategy.
    """

    question: str = ""
    is_compared: bool = False
    first: Choice = field(default_factory=Choice)
    second: Choice = field(default_factory=lambda: Choice("Random"))


def flatten_state(state: PageState) -> dict[str, Any]:
    """Return the values of a state by the name of their query parameter, such as ``first.budget``."""
    choices = {"first": asdict(state.first), "second": asdict(state.second)}
    values = {f"{number}.{name}": value for number, choice in choices.items() for name, value in choice.items()}
    return {"question": state.question, "is_compared": state.is_compared, **values}


def format_query(state: PageState) -> str:
    """Return the query string of a state: the values that differ from the initial page."""
    initial = flatten_state(PageState())
    return urlencode({name: value for name, value in flatten_state(state).items() if value != initial[name]})


def parse_query(parameters: Mapping[str, str], layers: int) -> PageState:
    """Return the state of a link; parameters with other names are ignored.

    Args:
        parameters: the query parameters of the page.
        layers: number of layers of the LLM.

    Raises:
        ValueError: if a value is not possible on the page; the error names the parameter.
    """
    state = PageState()
    question = parameters.get("question", state.question)
    is_compared = parse_option("is_compared", parameters.get("is_compared", "False"), ("False", "True")) == "True"
    choices = [parse_choice(parameters, number, layers) for number in ("first", "second")]
    return PageState(question, is_compared, *choices)


def parse_choice(parameters: Mapping[str, str], number: str, layers: int) -> Choice:
    """Return the first or the second strategy of a link.

    Args:
        parameters: the query parameters of the page.
        number: ``"first"`` or ``"second"``.
        layers: number of layers of the LLM.

    Raises:
        ValueError: if a value is not possible on the page.
    """
    options: dict[str, Mapping[str, type]] = {
        "before": list_strategies(is_inside=False),
        "selection": list_components(SelectionPolicy),
        "allocation": list_components(AllocationPolicy),
        "inside": list_strategies(is_inside=True, layers=layers),
    }
    limits = {"budget": 100, "layer": layers - 1, "inside_budget": 100}
    values: dict[str, Any] = {}
    for name in options.keys() | limits.keys():
        parameter = f"{number}.{name}"
        text = parameters.get(parameter)
        if text is not None:
            if name in limits:
                values[name] = parse_number(parameter, text, limits[name])
            else:
                values[name] = parse_option(parameter, text, (NONE, *options[name]))
    return replace(getattr(PageState(), number), **values)


def parse_option(parameter: str, text: str, options: tuple[str, ...]) -> str:
    """Return the text of a parameter.

    Raises:
        ValueError: if the text is not an option.
    """
    if text not in options:
        raise ValueError(f"the link has {parameter}={text}, which this page does not offer; use {', '.join(options)}")
    return text


def parse_number(parameter: str, text: str, limit: int) -> int:
    """Return the whole number of a parameter.

    Raises:
        ValueError: if the text is not a whole number from 1 to the limit.
    """
    if not text.isdecimal() or not 1 <= int(text) <= limit:
        raise ValueError(f"the link has {parameter}={text}; use a whole number from 1 to {limit}")
    return int(text)


def format_link(state: PageState, image: str) -> str:
    """Return a link to a state as HTML; its address is relative to the page.

    Args:
        state: the state.
        image: name of the uploaded file; empty for the bundled image.
    """
    hint = f"; upload {escape(image)} again, because a link contains no image" if image else ""
    return f'<a class="state" href="?{escape(format_query(state))}">Link to these settings</a>{hint}'
