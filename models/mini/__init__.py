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
_IMAGES = {"mini": ("board.png",), "mini-pages": ("page.png", "board.png")}
"""Demo images that a model can answer questions about; the first one is the default."""


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


def image_path(name: str = "mini") -> Path:
    """Return the file of a demo image of the held-out split.

    Args:
        name: name of a model: ``mini-pages`` has a page, every other model the board of ``mini``.
    """
    return _HERE / "images" / _IMAGES.get(name, _IMAGES["mini"])[0]


def describe_limits(image: str | Path, name: str = "mini") -> str:
    """Return a notice that an embedded model knows only the images that it was trained on.

    Args:
        image: the image file that the model is asked about.
        name: name or folder of a model.

    Returns:
        The notice; empty for the demo images of the model and for other models.
    """
    if name not in MODELS:
        return ""
    content = Path(image).expanduser().read_bytes()
    if any((_HERE / "images" / file).read_bytes() == content for file in _IMAGES[name]):
        return ""
    return (
        f"{Path(image).name}: the embedded model ({name}) was trained on {MODELS[name]} only; its answers about "
        "photographs and other images are meaningless. Load a checkpoint (--model) to ask about them"
    )


def demo_questions(name: str = "mini") -> list[dict[str, str]]:
    """Return the questions about the demo image of a model.

    Args:
        name: the name of the model, as for `image_path`.

    Returns:
        One dictionary per question with the keys ``question``, ``answer``, ``type`` and ``needs``.
    """
    return json.loads(image_path(name).with_suffix(".json").read_text())
