"""A miniature, really trained LLaVA-NeXT that ships inside the package, with the images that it understands.

The checkpoint is an ordinary folder: ``AutoModelForImageTextToText.from_pretrained(mini.path())`` and
``AutoProcessor.from_pretrained(mini.path())`` load it without a network. Its world are *notice boards*
(`tokenprune.models.mini.boards`): colored shapes that carry small numbers. Importing this module loads nothing heavy.
"""

import json
from pathlib import Path

__all__ = ["demo_questions", "image_path", "path", "text_path"]

_HERE = Path(__file__).parent


def path() -> Path:
    """Return the folder of the trained checkpoint."""
    return _HERE / "checkpoint"


def text_path() -> Path:
    """Return the folder of the CLIP model whose vision tower is that of the checkpoint, with its text tower."""
    return _HERE / "text"


def image_path() -> Path:
    """Return the file of the demo image, a board of the held-out split."""
    return _HERE / "images" / "board.png"


def demo_questions() -> list[dict[str, str]]:
    """Return the questions about the demo image.

    Returns:
        One dictionary a question with the keys ``question``, ``answer``, ``type`` and ``needs``.
    """
    questions: list[dict[str, str]] = json.loads((_HERE / "images" / "board.json").read_text())
    return questions
