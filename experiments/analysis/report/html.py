"""Renders a report as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenprune.experiments.analysis.report.blocks import Block, Heading, Image, ImageRow, Table, Text
from tokenprune.experiments.analysis.report.formatting import SAME

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #222; background: #fff;
  max-width: 1280px; margin: 2rem auto 4rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .6rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; } p, ul { max-width: 52rem; }
nav { font-size: .9rem; margin: 1rem 0; } nav a { margin-right: 1.1rem; white-space: nowrap; display: inline-block; }
a { color: #0072B2; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; background: #f3f3f3; padding: 0 .2em; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .55rem; border-bottom: 1px solid #e6e6e6; text-align: left; vertical-align: top; }
td { white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
td:first-child, td:last-child { white-space: normal; min-width: 9rem; max-width: 26rem; }
thead th { border-bottom: 2px solid #222; vertical-align: bottom; } tbody tr:hover { background: #f7f7f7; }
.ci { color: #666; font-size: .85em; white-space: nowrap; display: block; }
.note { background: #fff7e6; border-left: 4px solid #E69F00; padding: .1rem 1rem; margin: 1rem 0; }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .5em; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem;
  max-width: 52rem; }
.sides { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; align-items: flex-start; margin: .4rem 0 1.6rem; }
.sides figure { margin: 0; flex: 0 1 auto; max-width: 32rem; } .sides .head { font-weight: 600; margin-bottom: .2rem; }
.sides img { border: 1px solid #ddd; max-height: 27rem; width: auto; }
h4 { font-size: 1rem; margin: 1.4rem 0 .2rem; border-top: 1px solid #eee; padding-top: .8rem; }
@media print { nav { display: none; } .wide { overflow: visible; } }
"""


def render_html(blocks: Iterable[Block], folder: Path, colors: Mapping[str, str]) -> str:
    """Return a report as one HTML file that contains its style and figures.

    Args:
        blocks: the blocks of the report.
        folder: folder of the report; paths of figures are relative to it.
        colors: colors of table rows, by row name.
    """
    blocks = list(blocks)
    title = next(block.text for block in blocks if isinstance(block, Heading))
    headings = {number: block for number, block in enumerate(blocks) if isinstance(block, Heading)}
    links = [f'<a href="#s{n}">{_inline(head.text)}</a>' for n, head in headings.items() if head.level == 2]
    out = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body>",
    ]
    for number, block in enumerate(blocks):
        if isinstance(block, Heading):
            out.append(f'<h{block.level} id="s{number}">{_inline(block.text)}</h{block.level}>')
            if block.level == 1:
                out.append(f"<nav>{''.join(links)}</nav>")
        elif isinstance(block, Text) and block.bullets:
            entries = "".join(f"<li>{_inline(line)}</li>" for line in block.lines)
            out.append(f'<div class="note"><ul>{entries}</ul></div>')
        elif isinstance(block, Text):
            out += [f"<p>{_inline(line)}</p>" for line in block.lines]
        elif isinstance(block, Image):
            image = _image_tag(folder / block.path, block.caption.split(".")[0])
            out.append(f"<figure>{image}<figcaption>{_inline(block.caption)}</figcaption></figure>")
        elif isinstance(block, ImageRow):
            out.append(_image_row(block, folder, colors))
        else:
            out.append(_table(block, colors))
    return "\n".join([*out, "</body></html>"]) + "\n"


def _image_tag(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def _dot(name: str, colors: Mapping[str, str]) -> str:
    return f'<span class="dot" style="background:{colors[name]}"></span>' if name in colors else ""


def _image_row(block: ImageRow, folder: Path, colors: Mapping[str, str]) -> str:
    paths: Sequence[str | None] = block.paths or [None] * len(block.heads)
    parts = []
    for head, caption, path in zip(block.heads, block.captions, paths, strict=True):
        image = "" if path is None else _image_tag(folder / path, head)
        title = f'<div class="head">{_dot(head, colors)}{_inline(head)}</div>'
        parts.append(f"<figure>{title}{image}<figcaption>{_inline(caption)}</figcaption></figure>")
    return f'<div class="sides">{"".join(parts)}</div>'


def _table(table: Table, colors: Mapping[str, str]) -> str:
    head = "".join(f"<th>{_inline(name)}</th>" for name in table.head)
    body = []
    for line in table.rows:
        name = line[0]
        entries = [_dot(name, colors) + _inline(name), *map(_table_entry, line[1:])]
        body.append(f"<tr>{''.join(f'<td>{entry}</td>' for entry in entries)}</tr>")
    top = f"<thead><tr>{head}</tr></thead>" if any(table.head) else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(body)}</tbody></table></div>'


def _table_entry(text: str) -> str:
    """Return a table entry with its interval on a separate line."""
    match = re.fullmatch(r"(\S+) (\[[^\]]*\])(.*)", text)
    if not match:
        return _inline(text)
    mean, interval, suffix = match.groups()
    suffix = suffix.strip(" ,")
    if suffix == SAME:
        return f'{_inline(mean)} {SAME}<span class="ci">{interval}</span>'
    return f'{_inline(mean)}<span class="ci">{interval}</span>' + (
        f'<span class="ci">{_inline(suffix)}</span>' if suffix else ""
    )


def _inline(text: str) -> str:
    """Return text as HTML, with code in backticks and bold text between double asterisks."""
    text = html.escape(text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
