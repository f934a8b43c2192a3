"""The page of the demo, built with gradio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tokenprune.cli.demo.choices import (
    NONE,
    Choice,
    DemoConfig,
    format_command,
    format_python,
    list_components,
    list_strategies,
)
from tokenprune.cli.demo.results import answer, name_upload
from tokenprune.models import mini
from tokenprune.policies import AllocationPolicy, SelectionPolicy


def build_page(model: Any, processor: Any, config: DemoConfig) -> Any:
    """Return the page as gradio blocks. Calls of all visitors run one after another, because they share the model.

    Args:
        model: the model.
        processor: its processor.
        config: the options of the page.
    """
    import gradio

    def respond(path: str | None, question: str, is_compared: bool, *values: Any) -> tuple[str, str, str, str]:
        size = len(fields(Choice))
        choices = [Choice(*values[:size]), *([Choice(*values[size:])] if is_compared else [])]
        try:
            table, pages = answer(model, processor, config, path, question, choices)
            name = name_upload(path)
            commands = "\n".join(format_command(choice, config, name, question) for choice in choices)
            scripts = "\n\n".join(format_python(choice, config, name, question) for choice in choices)
        except (ValueError, LookupError, TypeError) as error:
            raise gradio.Error(" ".join(str(error).split()), print_exception=False) from error
        columns = "display:grid;gap:24px;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))"
        overlays = "".join(f"<div>{page}</div>" for page in pages)
        answers = f'<div style="overflow-x:auto">{table._repr_html_()}</div>'
        return answers, f'<div style="{columns}">{overlays}</div>', commands, scripts

    layers = model.config.get_text_config().num_hidden_layers

    def add_dropdown(names: Mapping[str, type], value: str, label: str) -> Any:
        return gradio.Dropdown([NONE, *names], value=value, label=label)

    def add_choice(number: int, default: Choice) -> list[Any]:
        with gradio.Group():
            return [
                add_dropdown(list_strategies(False), default.before, f"{number}: before the LLM"),
                gradio.Slider(1, 100, value=default.budget, step=1, label=f"{number}: budget (%)"),
                add_dropdown(list_components(SelectionPolicy), NONE, f"{number}: selection"),
                add_dropdown(list_components(AllocationPolicy), NONE, f"{number}: allocation"),
                add_dropdown(list_strategies(True), default.inside, f"{number}: inside the LLM"),
                gradio.Slider(1, layers - 1, value=default.layer, step=1, label=f"{number}: layer of the cut"),
                gradio.Slider(1, 100, value=default.inside_budget, step=1, label=f"{number}: budget inside (%)"),
            ]

    board = str(mini.image_path())
    questions = list(dict.fromkeys(entry["question"] for entry in mini.demo_questions()))
    with gradio.Blocks(title="tokenprune", analytics_enabled=False) as page:
        gradio.Markdown("# tokenprune\nAsk about an image, with all visual tokens and with a strategy.")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=320):
                image = gradio.Image(board, type="filepath", sources=["upload", "clipboard"], label="image", height=240)
                # gradio would decode the file; `open_image` checks its size first. A subclass has no frontend.
                image.preprocess = lambda payload: None if payload is None else payload.path
                question = gradio.Dropdown(
                    questions, value="How many shapes are there?", allow_custom_value=True, label="question"
                )
                button = gradio.Button("Answer", variant="primary")
                first = add_choice(1, Choice())
                is_compared = gradio.Checkbox(label="compare with a second strategy")
                with gradio.Accordion("second strategy", open=False):
                    second = add_choice(2, Choice("Random"))
            with gradio.Column(scale=2, min_width=320):
                table, tiles = gradio.HTML(label="answers"), gradio.HTML(label="kept tokens")
                command = gradio.Code(label="command line", language="shell", interactive=False)
                script = gradio.Code(label="Python", language="python", interactive=False)
        inputs = [image, question, is_compared, *first, *second]
        changes = [component.change for component in [*first, *second]]
        gradio.on(
            [button.click, is_compared.input, *changes],
            respond,
            inputs,
            [table, tiles, command, script],
            concurrency_limit=1,
            trigger_mode="always_last",
            api_name="answer",
        )
    return page
