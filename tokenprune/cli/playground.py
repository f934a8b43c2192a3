"""The command `tokenprune demo`: a page in the browser to try strategies on images, served by gradio.

The functions before `build_page` need no gradio. They map the choices of a visitor to a strategy, and results to HTML.
"""

from __future__ import annotations

import base64
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.catalog import components, strategies
from tokenprune.cli.options import build_parser, parse_options, parse_reducer, select_fields
from tokenprune.cli.status import show_status
from tokenprune.comparison import Comparison, compare
from tokenprune.display import encode_png
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.image_files import load_image
from tokenprune.models import mini
from tokenprune.policies import AllocationPolicy, Component, SelectionPolicy
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run
from tokenprune.strategies import Random

NONE = "(none)"
"""The choice of no strategy, or of the component that the strategy has by default."""


@dataclass(frozen=True)
class DemoConfig:
    """Options of `tokenprune demo`.

    Args:
        model: mini (embedded), a checkpoint folder, or a hub id.
        text_model: text tower of strategies that read the question; mini belongs to the embedded model.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto (float32 on a CPU), float32, bfloat16, float16.
        host: address to listen on; by default only this machine can open the page.
        port: port; by default the first free one from 7860.
        max_megabytes: largest size of an uploaded file.
        max_megapixels: largest size of an image.
        max_new_tokens: longest answer in tokens.
    """

    model: str = "mini"
    text_model: str = "mini"
    device: str = "auto"
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int | None = None
    max_megabytes: int = 10
    max_megapixels: int = 25
    max_new_tokens: int = 32


@dataclass(frozen=True)
class Choice:
    """A strategy as a visitor chooses it.

    Args:
        before: strategy before the LLM, or `NONE`.
        budget: its budget in percent.
        selection: its selection component; `NONE` for the default.
        allocation: its allocation component; `NONE` for the default.
        inside: strategy inside the LLM, or `NONE`.
        layer: layer of the cut.
        inside_budget: budget of the strategy inside the LLM, in percent.
    """

    before: str = "HiRED"
    budget: float = 20
    selection: str = NONE
    allocation: str = NONE
    inside: str = NONE
    layer: int = 2
    inside_budget: float = 50


def list_strategies(is_inside: bool) -> dict[str, type[TokenReducer]]:
    """Return the strategies before or inside the LLM that need no further argument, by name."""
    classes = sorted(strategies().items())
    return {
        name: cls
        for name, cls in classes
        if (cls.stage.name == "decoder") == is_inside
        and not any(f.init and f.default is MISSING and f.default_factory is MISSING for f in fields(cls))
    }


def list_components(kind: type[Component]) -> dict[str, type[Component]]:
    """Return the components of a kind that need no argument, by name."""
    return {
        name: cls
        for name, cls in sorted(components().items())
        if issubclass(cls, kind) and not any(f.default is MISSING and f.default_factory is MISSING for f in fields(cls))
    }


def format_ratio(percent: float) -> str:
    """Return a budget in percent as a ratio in Python; 100 % is ``1.0``, because ``1`` means one token."""
    return str(float(percent) / 100)


def list_parts(choice: Choice, text_model: str = "mini") -> list[str]:
    """Return the parts of the chosen strategy as Python expressions, in the order of their stages.

    Args:
        choice: the choice.
        text_model: text tower of strategies that read the question.

    Raises:
        ValueError: if no strategy is chosen, or a name is not on the page.
    """
    parts = []
    allowed = {"selection": list_components(SelectionPolicy), "allocation": list_components(AllocationPolicy)}
    if choice.before != NONE:
        if choice.before not in (classes := list_strategies(is_inside=False)):
            raise ValueError(f"there is no strategy {choice.before!r} on this page")
        arguments = [format_ratio(choice.budget)]
        for name, options in allowed.items():
            if (component := getattr(choice, name)) != NONE:
                if component not in options:
                    raise ValueError(f"there is no {name} component {component!r} on this page")
                if name not in {field.name for field in fields(classes[choice.before])}:
                    raise ValueError(f"{choice.before} has no {name} component; choose {NONE}, or HiRED")
                arguments.append(f"{name}={component}()")
        if classes[choice.before]().reads_question:
            arguments.append(f"text_model={text_model!r}")
        parts.append(f"{choice.before}({', '.join(arguments)})")
    if choice.inside != NONE:
        if choice.inside not in (classes := list_strategies(is_inside=True)):
            raise ValueError(f"there is no strategy {choice.inside!r} on this page")
        names = {field.name for field in fields(classes[choice.inside]) if field.init}
        values = {"layer": str(int(choice.layer)), "budget": format_ratio(choice.inside_budget)}
        parts.append(f"{choice.inside}({', '.join(f'{k}={v}' for k, v in values.items() if k in names)})")
    if not parts:
        raise ValueError("choose a strategy before the LLM, inside it, or both")
    return parts


def build_reducer(choice: Choice, text_model: str = "mini") -> TokenReducer:
    """Return the chosen strategy.

    Args:
        choice: the choice.
        text_model: text tower of strategies that read the question.

    Raises:
        ValueError: if the choice is not valid.
    """
    return parse_reducer(["--reducer", "+".join(list_parts(choice, text_model))])


def format_command(choice: Choice, config: DemoConfig, image: str, question: str) -> str:
    """Return the command line with the same result.

    Args:
        choice: the strategy.
        config: the options of the page.
        image: the name of the image file; empty for the bundled board.
        question: the question.
    """
    words = ["tokenprune", "run", "--model", config.model, *(["--image", image] if image else [])]
    words += ["--question", question, "--reducer", "+".join(list_parts(choice, config.text_model))]
    return shlex.join(words)


def format_python(choice: Choice, config: DemoConfig, image: str, question: str) -> str:
    """Return a Python script with the same result; takes the arguments of `format_command`."""
    parts = list_parts(choice, config.text_model)
    names = [name for name in (choice.before, choice.inside) if name != NONE]
    classes: list[type] = [strategies()[name] for name in names]
    classes += [components()[name] for name in (choice.selection, choice.allocation) if name != NONE]
    imports = "\n".join(f"from {cls.__module__} import {cls.__name__}" for cls in classes)
    path = repr(image) if image else "mini.image_path()"
    return f"""from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.image_files import load_image
from tokenprune.models import mini
{imports}

model, processor = load({config.model!r}, {config.device!r}, {config.dtype!r})
inputs = model_inputs(model, processor, load_image({path}), [{question!r}], "image")
with ({" >> ".join(parts)})(model, tokenizer=processor) as run:
    output = model.generate(**inputs, max_new_tokens={config.max_new_tokens}, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
print(run.account)
"""


def format_tiles(run: Run) -> str:
    """Return the tiles of the first image as SVG: remaining tokens are clear, and hovering shows score and rank.

    Args:
        run: the record of a call with an image.
    """
    selection = run.selections[0].cpu()
    kept = list(run.find_cuts(0).values())[-1].kept.cpu() if run.cuts else selection.kept
    if selection.pixels is None:
        return ""
    layout = selection.geometry
    (rows, cols), (tile_rows, tile_cols) = layout.token_grid, layout.tile_grid
    scores = selection.scores
    ranks = None if scores is None else scores.flatten().argsort(descending=True, stable=True).argsort().view_as(scores)
    tiles = []
    for tile in range(layout.tiles):
        data = base64.b64encode(encode_png(Image.fromarray(selection.pixels[tile].numpy()))).decode()
        rects = []
        for token in range(layout.tokens):
            row, col = divmod(token, cols)
            state = "kept" if kept[tile, token] else "dropped" if layout.valid[tile, token] else "padding"
            text = f"row {row + 1}, col {col + 1}: {state}"
            if scores is not None and ranks is not None and state != "padding":
                text += f", score {scores[tile, token]:.4g}, rank {int(ranks[tile, token]) + 1}"
            style = 'fill="none" stroke="#D55E00"' if state == "kept" else 'fill="#EBEBEB" fill-opacity="0.8"'
            rects.append(
                f'<rect x="{col}" y="{row}" width="1" height="1" {style} stroke-width="0.06" pointer-events="all">'
                f"<title>{text}</title></rect>"
            )
        place = "1 / 1" if tile == 0 else f"{(tile - 1) // tile_cols + 1} / {(tile - 1) % tile_cols + 2}"
        tiles.append(
            f'<svg viewBox="0 0 {cols} {rows}" style="grid-area:{place};width:100%"><image width="{cols}" '
            f'height="{rows}" preserveAspectRatio="none" href="data:image/png;base64,{data}"/>{"".join(rects)}</svg>'
        )
    columns = 1 + tile_cols if tile_rows else 1
    style = f"display:grid;gap:6px;grid-template-columns:repeat({columns},minmax(0,1fr));max-width:{columns * 320}px"
    return f'<div class="tiles" style="{style}">{"".join(tiles)}</div>'


def open_image(path: str | None, max_megapixels: int) -> Image.Image:
    """Return an uploaded image, or the bundled board without a file. The size is checked before decoding.

    Args:
        path: the file; None for the bundled board.
        max_megapixels: largest number of pixels, in millions.

    Raises:
        ValueError: if the file is no image, or too large.
    """
    file = path or str(mini.image_path())
    try:
        with Image.open(file) as image:
            width, height = image.size
    except (OSError, Image.DecompressionBombError):
        raise ValueError("this file is not an image that can be read; use PNG or JPEG") from None
    if width * height > max_megapixels * 1e6:
        raise ValueError(f"the image has {width} x {height} pixels; the limit is {max_megapixels} million pixels")
    return load_image(file)


def name_upload(path: str | None) -> str:
    """Return the name of an uploaded file; empty for the bundled board, which the page copies under another path."""
    is_board = path is None or Path(path).read_bytes() == mini.image_path().read_bytes()
    return "" if path is None or is_board else Path(path).name


def answer(
    model: Any, processor: Any, config: DemoConfig, path: str | None, question: str, choices: Sequence[Choice]
) -> tuple[Comparison, list[str]]:
    """Answer a question with all tokens and with each chosen strategy.

    Args:
        model: the model.
        processor: its processor.
        config: the options of the page.
        path: the image file; None for the bundled board.
        question: the question.
        choices: the strategies.

    Returns:
        The comparison, with all tokens first, and the HTML of each strategy: tokens, cost and overlay.

    Raises:
        ValueError: if image, question or a choice is not valid.
    """
    if not question.strip() or "<image>" in question or len(question) > 2000:
        raise ValueError("ask a question of at most 2000 characters, without <image>")
    image = open_image(path, config.max_megapixels)
    reducers = [build_reducer(choice, config.text_model) for choice in choices]
    inputs = model_inputs(model, processor, image, [question], "the image")
    table = compare(model, inputs, [Random(1.0), *reducers], processor=processor, max_new_tokens=config.max_new_tokens)
    table = replace(table, rows=[replace(table.rows[0], strategy="all tokens"), *table.rows[1:]])
    pages = [
        f"<h3>{escape(row.strategy)}, {escape(row.budget)}</h3>{format_tiles(run)}{run.account._repr_html_()}"
        for row, run in zip(table.rows[1:], table.runs[1:], strict=True)
    ]
    return table, pages


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
        notice = mini.describe_limits(path) if path is not None and config.model == "mini" else ""
        note = f"<p><strong>{escape(notice)}</strong></p>" if notice else ""
        answers = f'{note}<div style="overflow-x:auto">{table._repr_html_()}</div>'
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


def run(argv: Sequence[str]) -> None:
    """Run the command `demo` until Ctrl-C.

    Raises:
        ValueError: if gradio is not installed, or an option is not valid.
    """
    description = "Try strategies on images in the browser."
    config = select_fields(DemoConfig, parse_options(build_parser("tokenprune demo", description, DemoConfig), argv))
    with tempfile.TemporaryDirectory(prefix="tokenprune-demo-") as folder:
        page, options = prepare_page(config, folder)
        page.launch(**options)


def prepare_page(config: DemoConfig, folder: str) -> tuple[Any, dict[str, Any]]:
    """Return the page and the arguments of its `launch`.

    Args:
        config: the options of the command.
        folder: temporary folder; uploaded files are written only here.

    Raises:
        ValueError: if gradio is not installed, or the model cannot be loaded.
    """
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ValueError('`tokenprune demo` needs gradio; install it with: pip install "tokenprune[demo]"') from None
    with show_status("loading the model"):
        page = build_page(*load(config.model, config.device, config.dtype), config)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # loads no web font
    return page, {
        "server_name": config.host,
        "server_port": config.port,
        "max_file_size": f"{config.max_megabytes}mb",
        "share": False,
        "ssr_mode": False,
        "theme": theme,
    }
