"""Renders a report as one self-contained HTML file."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tokenprune.experiments.analysis.report.blocks import Block, Heading
from tokenprune.experiments.analysis.report.formatting import SAME


def render_html(blocks: Iterable[Block], folder: Path, colors: Mapping[str, str]) -> str:
    """Return a report as one HTML file that contains its style and figures.

    Args:
        blocks: the blocks of the report.
        folder: folder of the report; paths of figures are relative to it.
        colors: colors of table rows, by row name.
    """
    blocks = list(blocks)
    headings = [(number, block) for number, block in enumerate(blocks) if isinstance(block, Heading)]
    environment = Environment(
        loader=PackageLoader("tokenprune.experiments.analysis.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "inline": render_inline,
        "entry": render_entry,
        "base64_of_file": lambda path: base64.b64encode((folder / path).read_bytes()).decode(),
    }
    return environment.get_template("report.html.jinja").render(
        blocks=blocks,
        colors=colors,
        title=headings[0][1].text,
        links=[(number, heading.text) for number, heading in headings if heading.level == 2],
    )


def render_inline(text: str) -> Markup:
    """Return text as HTML, with code in backticks and bold text between double asterisks.

    Args:
        text: the text.
    """
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", html))


def render_entry(text: str) -> Markup:
    """Return a table entry as HTML, with its interval on a separate line.

    Args:
        text: the entry.
    """
    match = re.fullmatch(r"(\S+) (\[[^\]]*\])(.*)", text)
    if not match:
        return render_inline(text)
    mean, interval, suffix = match.groups()
    suffix = suffix.strip(" ,")
    parts = [render_inline(mean)]
    if suffix == SAME:
        parts.append(Markup(f" {SAME}"))
    parts.append(Markup('<span class="ci">{}</span>').format(interval))
    if suffix and suffix != SAME:
        parts.append(Markup('<span class="ci">{}</span>').format(render_inline(suffix)))
    return Markup("").join(parts)
