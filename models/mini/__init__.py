"""A trained miniature LLaVA-NeXT inside the package, with images on which it was trained to answer questions.

The checkpoint is an ordinary folder: ``AutoModelForImageTextToText.from_pretrained(mini.path())`` and
``AutoProcessor.from_pretrained(mini.path())`` load it without a network. Its images are *notice boards*
(`tokenprune.models.mini.boards`): colored shapes with small numbers. The module also draws dense *pages*
(`tokenprune.models.mini.pages`), which this checkpoint was not trained on. Importing it loads no heavy dependency.
"""

import json
from pathlib import Path

__all__ = ["demo_questions", "describe_limits", "image_path", "path", "text_path"]

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


def describe_limits(image: str | Path) -> str:
    """Return a notice that the model knows only the images that it was trained on; empty for the demo image.

    Args:
        image: the image file that the model is asked about.
    """
    if Path(image).expanduser().read_bytes() == image_path().read_bytes():
        return ""
    return (
        f"{Path(image).name}: the embedded model (mini) was trained on drawn boards only; its answers about "
        "photographs and other images are meaningless. Load a checkpoint (--model) to ask about them"
    )


picture_path = image_path  # the earlier name, which published scripts use


def demo_questions() -> list[dict[str, str]]:
    """Return the questions about the demo image.

    Returns:
        One dictionary per question with the keys ``question``, ``answer``, ``type`` and ``needs``.
    """
    return json.loads((_HERE / "images" / "board.json").read_text())
