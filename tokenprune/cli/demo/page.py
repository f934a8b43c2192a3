"""The page of the demo, built with gradio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from html import escape
from typing import Any

import gradio

from tokenprune.cli.demo.choices import (
    NONE,
    Choice,
    DemoConfig,
    format_command,
    format_python,
    list_components,
    list_strategies,
)
from tokenprune.cli.demo.links import PageState, format_link, format_query, parse_query
from tokenprune.cli.demo.results import answer, name_upload
from tokenprune.models import mini
from tokenprune.policies import AllocationPolicy, SelectionPolicy

CHOICE_SIZE = len(fields(Choice))
"""Number of controls of one strategy."""


DEFAULT_QUESTION = "How many shapes are there?"


def build_page(model: Any, processor: Any, config: DemoConfig) -> Any:
    """Return the page as gradio blocks. Calls of all visitors run one after another, because they share the model.

    Args:
        model: the model.
        processor: its processor.
        config: the options of the page.
    """

    def respond(path: str | None, question: str, is_compared: bool, *values: Any) -> tuple[str, ...]:
        first, second = Choice(*values[:CHOICE_SIZE]), Choice(*values[CHOICE_SIZE:])
        choices = [first, *([second] if is_compared else [])]
        try:
            table, pages = answer(model, processor, config, path, question, choices)
            name = name_upload(path, config.model)
            commands = "\n".join(format_command(choice, config, name, question) for choice in choices)
            scripts = "\n\n".join(format_python(choice, config, name, question) for choice in choices)
        except (ValueError, LookupError, TypeError) as error:
            raise gradio.Error(" ".join(str(error).split()), print_exception=False) from error
        columns = "display:grid;gap:24px;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))"
        overlays = "".join(f"<div>{page}</div>" for page in pages)
        notice = "" if path is None else mini.describe_limits(path, config.model)
        note = f"<p><strong>{escape(notice)}</strong></p>" if notice else ""
        answers = f'{note}<div style="overflow-x:auto">{table._repr_html_()}</div>'
        link = format_link(PageState(question, is_compared, first, second), name)
        return answers, f'<div style="{columns}">{overlays}</div>', commands, scripts, link

    layers = model.config.get_text_config().num_hidden_layers
    missing = list_strategies(True).keys() - list_strategies(True, layers).keys()
    info = f"without {', '.join(sorted(missing))}: the LLM has only {layers} layers" if missing else None

    def open_link(request: gradio.Request) -> Any:
        parameters = dict(request.query_params)
        try:
            state = parse_query(parameters, layers)
        except ValueError as error:
            gradio.Warning(escape(str(error)))
            state = PageState()
        if state == PageState():
            return [gradio.skip()] * (3 + 2 * CHOICE_SIZE)
        choices = (getattr(choice, field.name) for choice in (state.first, state.second) for field in fields(Choice))
        return [state.question or question_value, state.is_compared, *choices, format_query(state)]

    def add_dropdown(names: Mapping[str, type], value: str, label: str, info: str | None = None) -> Any:
        return gradio.Dropdown([NONE, *names], value=value, label=label, info=info)

    def add_choice(number: int, default: Choice) -> list[Any]:
        with gradio.Group():
            return [
                add_dropdown(list_strategies(False), default.before, f"{number}: before the LLM"),
                gradio.Slider(1, 100, value=default.budget, step=1, label=f"{number}: budget (%)"),
                add_dropdown(list_components(SelectionPolicy), NONE, f"{number}: selection"),
                add_dropdown(list_components(AllocationPolicy), NONE, f"{number}: allocation"),
                add_dropdown(list_strategies(True, layers), default.inside, f"{number}: inside the LLM", info),
                gradio.Slider(1, layers - 1, value=default.layer, step=1, label=f"{number}: layer of the cut"),
                gradio.Slider(1, 100, value=default.inside_budget, step=1, label=f"{number}: budget inside (%)"),
            ]

    initial = PageState()
    file = str(mini.image_path(config.model))
    questions = list(dict.fromkeys(entry["question"] for entry in mini.demo_questions(config.model)))
    question_value = DEFAULT_QUESTION if DEFAULT_QUESTION in questions else questions[0]
    with gradio.Blocks(title="tokenprune", analytics_enabled=False) as page:
        gradio.Markdown("# tokenprune\nAsk about an image, with all visual tokens and with a strategy.")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=320):
                image = gradio.Image(file, type="filepath", sources=["upload", "clipboard"], label="image", height=240)
                # gradio would decode the file; `open_image` checks its size first. A subclass has no frontend.
                image.preprocess = lambda payload: None if payload is None else payload.path
                question = gradio.Dropdown(questions, value=question_value, allow_custom_value=True, label="question")
                button = gradio.Button("Answer", variant="primary")
                first = add_choice(1, initial.first)
                is_compared = gradio.Checkbox(label="compare with a second strategy")
                with gradio.Accordion("second strategy", open=False):
                    second = add_choice(2, initial.second)
            with gradio.Column(scale=2, min_width=320):
                table, tiles = gradio.HTML(label="answers"), gradio.HTML(label="kept tokens")
                link = gradio.HTML(label="link")
                command = gradio.Code(label="command line", language="shell", interactive=False)
                script = gradio.Code(label="Python", language="python", interactive=False)
        query = gradio.State("")
        inputs = [image, question, is_compared, *first, *second]
        changes = [component.change for component in [*first, *second, query]]
        page.load(open_link, None, [*inputs[1:], query], api_name=False)
        gradio.on(
            [button.click, is_compared.input, *changes],
            respond,
            inputs,
            [table, tiles, command, script, link],
            concurrency_limit=1,
            trigger_mode="always_last",
            api_name="answer",
        )
    return page
