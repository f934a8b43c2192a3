"""Two trained miniature LLaVA-NeXT inside the package, with images on which they were trained to answer questions.

The checkpoints are ordinary folders: ``AutoModelForImageTextToText.from_pretrained(mini.path())`` and
``AutoProcessor.from_pretrained(mini.path())`` load them without a network. ``mini`` answers questions about *notice
boards* (`tokenprune.models.mini.boards`): colored shapes with small numbers. ``mini-pages`` answers questions about
boards and dense *pages* (`tokenprune.models.mini.pages`). Importing this module loads no heavy dependency.
"""

import json
from pathlib import Path
from types import MappingProxyType

__all__ = ["MODELS", "demo_questions", "describe_limits", "image_path", "path", "text_path"]

_HERE = Path(__file__).parent
MODELS = MappingProxyType({"mini": "drawn boards", "mini-pages": "drawn boards and pages"})
"""Names of the embedded models, with the images that they were trained on."""
_FOLDERS = {"mini": ("checkpoint", "text"), "mini-pages": ("pages_checkpoint", "pages_text")}


def path(name: str = "mini") -> Path:
    """Return the folder of a trained checkpoint.

    Args:
        name: a name of `MODELS`.
    """
    return _HERE / _FOLDERS[name][0]


def text_path(name: str = "mini") -> Path:
    """Return the folder of a CLIP model: the vision tower of a checkpoint and a matching text tower.

    Args:
        name: a name of `MODELS`.
    """
    return _HERE / _FOLDERS[name][1]


def image_path() -> Path:
    """Return the file of the demo image, a board of the held-out split."""
    return _HERE / "images" / "board.png"


def describe_limits(image: str | Path, name: str = "mini") -> str:
    """Return a notice that an embedded model knows only the images that it was trained on.

    Args:
        image: the image file that the model is asked about.
        name: name or folder of a model.

    Returns:
        The notice; empty for the demo image and for other models.
    """
    if name not in MODELS or Path(image).expanduser().read_bytes() == image_path().read_bytes():
        return ""
    return (
        f"{Path(image).name}: the embedded model ({name}) was trained on {MODELS[name]} only; its answers about "
        "photographs and other images are meaningless. Load a checkpoint (--model) to ask about them"
    )


def demo_questions() -> list[dict[str, str]]:
    """Return the questions about the demo image.

    Returns:
        One dictionary per question with the keys ``question``, ``answer``, ``type`` and ``needs``.
    """
    return json.loads((_HERE / "images" / "board.json").read_text())
