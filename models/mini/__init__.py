"""A trained miniature LLaVA-NeXT inside the package, with images on which it was trained to answer questions.

The checkpoint is an ordinary folder: ``AutoModelForImageTextToText.from_pretrained(mini.path())`` and
``AutoProcessor.from_pretrained(mini.path())`` load it without a network. Its images are *notice boards*
(`tokenprune.models.mini.boards`): colored shapes with small numbers. The module also draws dense *pages*
(`tokenprune.models.mini.pages`), which this checkpoint was not trained on. Importing it loads no heavy dependency.
"""

import json
from pathlib import Path

__all__ = ["demo_questions", "image_path", "path", "text_path"]

_HERE = Path(__file__).parent


def path() -> Path:
    """Return the folder of the trained checkpoint."""
    return _HERE / "checkpoint"


def text_path() -> Path:
    """Return the folder of a CLIP model: the vision tower of the checkpoint and a matching text tower."""
    return _HERE / "text"


def image_path() -> Path:
    """Return the file of the demo image, a board of the held-out split."""
    return _HERE / "images" / "board.png"


picture_path = image_path  # the earlier name, which published scripts use


def demo_questions() -> list[dict[str, str]]:
    """Return the questions about the demo image.

    Returns:
        One dictionary per question with the keys ``question``, ``answer``, ``type`` and ``needs``.
    """
    return json.loads((_HERE / "images" / "board.json").read_text())
