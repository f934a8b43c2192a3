"""Plain text, HTML and PNG: the formats that `__str__`, `_repr_html_` and `_repr_png_` of public classes return.

The module imports only the standard library and Pillow, so that a class can import it when it is displayed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``"1 setting"`` and ``"2 settings"``.

    Args:
        number: the number.
        noun: the noun in the singular; its plural ends in s.
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of plain text with aligned columns.

    Args:
        rows: the texts of each row, headings first; all rows have the same number of texts.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return an HTML table with escaped texts; columns after the first are aligned to the right.

    Args:
        columns: the headings.
        rows: the texts of each row, one per column.
        caption: text above the table.
    """

    def cells(tag: str, texts: Sequence[str]) -> str:
        aligned = zip(texts, ["left", *["right"] * (len(texts) - 1)], strict=True)
        return "".join(f'<{tag} style="text-align:{align}">{escape(text)}</{tag}>' for text, align in aligned)

    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table>{head}<thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table>"


def encode_png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file.

    Args:
        image: the image.
    """
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def format_image(image: Image.Image, text: str) -> str:
    """Return an HTML element with an embedded image.

    Args:
        image: the image.
        text: the description for readers who do not see the image.
    """
    data = base64.b64encode(encode_png(image)).decode()
    return f'<img alt="{escape(text)}" style="max-width:100%" src="data:image/png;base64,{data}">'
