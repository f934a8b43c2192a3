"""The work of `tokenprune run`: answers with all visual tokens and with a strategy, side by side."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from tokenprune.cli.status import pause_garbage_collection
from tokenprune.configuration import as_config
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.image_files import find_free_path, load_image, save_image
from tokenprune.models import mini
from tokenprune.pipeline import call_generate
from tokenprune.policies import Component
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run
from tokenprune.strategies import HiRED
from tokenprune.viz import FIGURE_SUFFIXES, draw_mask, draw_report, format_caption, save_figure

DEMO_TYPES = (
    *("value", "name", "color_value", "largest", "compare"),  # pages
    *("number_pair", "number_shape", "color", "shape", "side", "count", "paper"),
)
"""Question types of the bundled images in the order of the table; each type has one question."""


@dataclass(frozen=True)
class RunConfig:
    """Options of `tokenprune run`.

    Args:
        plugin: Python files with further strategies.
        model: mini or mini-pages (embedded), a checkpoint folder, or a hub id.
        image: image files; by default the bundled board (mini-pages: the bundled page).
        question: questions; each is asked about each image.
        reducer: strategy: a class name (HiRED, hired), a preset (HiRED.release) or file.py:Class, e.g. with
            --reducer.selection RandomSelection --reducer.selection.seed 3; or a composition
            'HiRED(0.4)+AtLayer(2, DivPrune(0.5))', e.g. with --reducer.parts.0.budget 0.3.
        max_new_tokens: longest answer in tokens.
        repeats: timed runs for the time to first token of the first question; with --json, of every question.
        out: folder for the overlay; existing files are kept, and the overlay gets the next free number.
        figure: file of a figure for papers with the kept tokens over the image: .png, .pdf or .svg.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto (float32 on a CPU), float32, bfloat16, float16.
        json: print one JSON object: the fields of the first answer, and all answers under `results`.
    """

    plugin: list[str] = field(default_factory=list)
    model: str = "mini"
    image: list[str] | None = None
    question: list[str] | None = None
    reducer: TokenReducer = field(default_factory=HiRED)
    max_new_tokens: int = 32
    repeats: int = 3
    out: str = "tokenprune-out"
    figure: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    json: bool = False


@dataclass(frozen=True)
class Answer:
    """The results of one question about one image, answered with all tokens and with the strategy.

    `ttft_ms` is the time of a `generate` call for one token, with the vision tower and without input preparation. It is
    the median of several calls, alternating between full and reduced, after a warm-up of both; None without a call.
    """

    image: str
    question: str
    expected: str | None
    answer_full: str
    answer: str
    asked: int
    kept: int
    valid: int
    budgets: list[int]
    kept_per_tile: list[int]
    tile_grid: tuple[int, int]
    newlines: int
    newlines_full: int
    average_tokens: float
    tokens_per_layer: list[int]
    cuts: list[dict[str, int]]
    prompt_length: int
    prompt_length_full: int
    ttft_ms: float | None
    ttft_full_ms: float | None
    kv_bytes: int
    kv_bytes_full: int
    prefill_flops: int
    prefill_flops_full: int
    attention: str | None
    saliency_flops: int
    overlay: str | None = None
    figure: str | None = None
    file_error: str | None = None


def answer_all(config: RunConfig) -> list[Answer]:
    """Load images and model, then answer each question about each image.

    An overlay that cannot be written does not discard the answers: `Answer.overlay_error` states the reason.

    Raises:
        ValueError: if an image, the model or an option cannot be used; the error states the fault and the action.
    """
    if config.figure is not None and Path(config.figure).suffix.lower() not in FIGURE_SUFFIXES:
        raise ValueError(f"--figure {config.figure}: give a file that ends in {', '.join(FIGURE_SUFFIXES)}")
    if config.max_new_tokens < 1 or config.repeats < 1:
        raise ValueError("--max-new-tokens and --repeats must be at least 1")
    files = list(config.image) if config.image else [str(mini.image_path(config.model))]
    images = [load_image(file) for file in files]
    if config.question:
        questions: list[tuple[str, str | None]] = [(question, None) for question in config.question]
    elif config.image:
        questions = [("What is in the image?", None)]
    else:
        bundled = mini.demo_questions(config.model)
        first = {kind: next((q for q in bundled if q["type"] == kind), None) for kind in DEMO_TYPES}
        questions = [(q["question"], q["answer"]) for q in first.values() if q is not None]
    for question, _ in questions:
        if not question.strip() or "<image>" in question:
            raise ValueError(
                f"--question {question!r}: give a text without <image>; the placeholder is added automatically"
            )
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be created as a folder ({error.strerror}); give another path") from error
    for file in files:
        if notice := mini.describe_limits(file, config.model):
            print(f"tokenprune: {notice}", file=sys.stderr)
    with pause_garbage_collection():
        model, processor = load(config.model, config.device, config.dtype)
    answers = list[Answer]()
    for file, image in zip(files, images, strict=True):
        written: dict[str, Any] = {}
        for position, (question, expected) in enumerate(questions):
            inputs = model_inputs(model, processor, image, [question], file)
            timed = config if config.json or position == 0 else replace(config, repeats=0)  # tables show only the first
            result, run = answer_question(model, processor, inputs, timed, file, question, expected)
            written = written or write_drawings(config, result, run, image)
            answers.append(replace(result, **written))
    return answers


def write_drawings(config: RunConfig, result: Answer, run: Run, image: Image.Image) -> dict[str, Any]:
    """Write the overlay and the figure of an image, and return the fields of `Answer` that name the files.

    An error is a field, too, because the answers must not be lost.

    Args:
        config: the options.
        result: the first answer about the image.
        run: the record of the answer.
        image: the image.
    """
    selection, cuts = run.selections[0], run.find_cuts(0)
    caption = format_caption(run.strategy, run.budget, selection, result.question, result.answer)
    overlay = draw_report(selection, image, cuts, caption, run.find_tower_mask(0))
    drawings: list[tuple[str, Path, Callable[[Path], None]]] = [
        ("overlay", Path(config.out) / "overlay.png", partial(save_image, overlay))
    ]
    if config.figure is not None:
        save = partial(save_figure, draw_mask(selection, image, cuts))
        drawings.append(("figure", Path(config.figure), save))
    written: dict[str, Any] = {}
    for name, wanted, write in drawings:
        path = find_free_path(wanted)
        try:
            write(path)
        except OSError as error:
            return {**written, "file_error": f"{path} cannot be written: {error.strerror or error}"}
        written[name] = str(path)
    return written


def answer_question(
    model: Any,
    processor: Any,
    inputs: Any,
    config: RunConfig,
    file: str,
    question: str,
    expected: str | None,
) -> tuple[Answer, Run]:
    """Answer one question with all tokens and with the strategy, and time the first token of both."""
    length = inputs["input_ids"].shape[1]

    def generate(tokens: int) -> str:
        out = call_generate(model, inputs, max_new_tokens=tokens, do_sample=False)
        text: str = processor.decode(out[0, length:], skip_special_tokens=True)
        return text.strip()

    def first_token() -> float:
        began = time.perf_counter()
        generate(1)  # decoding reads the tokens, which synchronizes a GPU
        return (time.perf_counter() - began) * 1000

    full = generate(config.max_new_tokens)
    with config.reducer(model, tokenizer=processor) as run:
        reduced = generate(config.max_new_tokens)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(config.repeats):
        times[0].append(first_token())
        with config.reducer(model, tokenizer=processor):
            times[1].append(first_token())
    image, (before, after) = run.account.images[0], run.account.prompt_lengths[0]
    result = Answer(
        image=file,
        question=question,
        expected=expected,
        answer_full=full,
        answer=reduced,
        asked=image.asked,
        kept=image.kept,
        valid=image.valid,
        budgets=list(image.granted_per_tile),
        kept_per_tile=list(image.kept_per_tile),
        tile_grid=run.selections[0].geometry.tile_grid,
        newlines=image.newlines,
        newlines_full=image.newlines_full,
        average_tokens=run.account.average_tokens,
        tokens_per_layer=run.account.tokens_per_layer,
        cuts=run.account.summary()["cuts"],
        prompt_length=after,
        prompt_length_full=before,
        ttft_ms=statistics.median(times[1]) if times[1] else None,
        ttft_full_ms=statistics.median(times[0]) if times[0] else None,
        kv_bytes=run.account.kv_bytes,
        kv_bytes_full=run.account.kv_bytes_full,
        prefill_flops=run.account.flops,
        prefill_flops_full=run.account.flops_full,
        attention=run.account.attention,
        saliency_flops=run.account.saliency_flops,
    )
    return result, run


def format_json(config: RunConfig, answers: Sequence[Answer]) -> str:
    """Return the answers as one JSON object: the fields of the first answer, and all answers under `results`."""
    rows = [asdict(entry) for entry in answers]
    return json.dumps({"model": config.model, "reducer": as_config(config.reducer), **rows[0], "results": rows})


def describe_reducer(reducer: TokenReducer) -> str:
    """Return the label of a strategy, with the components that replace its own: ``"HiRED (RandomSelection)"``.

    Args:
        reducer: the strategy.
    """
    values = {item.name: getattr(reducer, item.name) for item in fields(reducer)}
    defaults = {item.name: item.default_factory() for item in fields(reducer) if item.default_factory is not MISSING}
    replaced = [
        type(value).__name__
        for name, value in values.items()
        if isinstance(value, Component) and value != defaults.get(name)
    ]
    return f"{reducer.label} ({', '.join(replaced)})" if replaced else reducer.label


def print_table(config: RunConfig, answers: Sequence[Answer]) -> None:
    """Print the answers side by side, and the cost of both."""
    console, name = Console(), describe_reducer(config.reducer)
    for file in dict.fromkeys(entry.image for entry in answers):
        entries = [entry for entry in answers if entry.image == file]
        table = Table(title=file, title_justify="left")
        for column in ("question", "all tokens", name, *(["right answer"] if entries[0].expected else [])):
            table.add_column(column, overflow="fold")
        for entry in entries:
            expected = [entry.expected] if entry.expected else []
            table.add_row(entry.question, entry.answer_full, entry.answer, *expected)
        console.print(table)
        first = entries[0]
        cost = Table(title="first question", title_justify="left")
        for column in ("", "all tokens", name, "ratio"):
            cost.add_column(column, justify="left" if column == "" else "right")
        rows: list[tuple[str, float, float, str]] = [
            ("prompt length (tokens)", first.prompt_length_full, first.prompt_length, ",.0f"),
            ("time to first token (ms)", first.ttft_full_ms or 0.0, first.ttft_ms or 0.0, ",.1f"),
            ("KV cache after prefill (kB)", first.kv_bytes_full / 1e3, first.kv_bytes / 1e3, ",.1f"),
            ("LLM prefill (MFLOP)", first.prefill_flops_full / 1e6, first.prefill_flops / 1e6, ",.1f"),
        ]
        for label, full, reduced, style in rows:
            cost.add_row(label, format(full, style), format(reduced, style), f"{reduced / full:.2f}")
        console.print(cost)
        tiles = f"base tile and {first.tile_grid[0]} x {first.tile_grid[1]} sub-images"
        tiles = tiles if any(first.tile_grid) else "one tile"
        counts = f"{first.asked} asked, {first.kept} kept of {first.valid} valid {first.kept_per_tile}"
        console.print(f"visual tokens: {counts} ({tiles}), and {first.newlines} newline tokens", soft_wrap=True)
        for cut in first.cuts:
            console.print(f"from layer {cut['layer']}: {cut['asked']} asked, {cut['kept']} kept", soft_wrap=True)
        if first.cuts:
            layers = len(first.tokens_per_layer)
            console.print(f"visual tokens on average over {layers} layers: {first.average_tokens:.1f}", soft_wrap=True)
        if first.attention is not None:
            saliency_cost = f", {first.saliency_flops / 1e6:,.1f} MFLOP" if first.saliency_flops else ""
            console.print(f"attention read: {first.attention}{saliency_cost}", soft_wrap=True)
        for kind, path in (("overlay", first.overlay), ("figure", first.figure)):
            if path is not None:
                console.print(f"{kind}: {path}", soft_wrap=True)
