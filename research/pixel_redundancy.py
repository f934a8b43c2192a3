"""Counts the tokens that PixelPrune drops from drawn documents and screens, and the FLOPs of the vision tower.

Run it: ``python -m research.pixel_redundancy``

The images are drawn here, processed by the image processor of Qwen2-VL, and encoded by a tower with the layers of
Qwen2-VL-7B and random weights: 32 layers, width 1280. FLOPs are counted in towers of one and two layers. Layers are
equal, so that the difference is the cost of each further layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

from tokenprune.adapter import Adapter, find_adapter
from tokenprune.experiments.bench.flop_counter import create_flop_counter
from tokenprune.pixels import PixelSelector
from tokenprune.selection import Selection
from tokenprune.strategies import PixelPrune
from tokenprune.testing.examples.configs import MROPE_IDS, build_mrope_config

THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2)
"""Largest difference of a pixel of a dropped token from its prediction; pixels range from 0 to 1."""
DEPTH = 32
"""Layers of the vision tower of Qwen2-VL-7B."""
WORDS = ("the", "budget", "of", "a", "tile", "grows", "with", "its", "similarity", "to", "the", "image")


def draw_text(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], size: int, seed: int, color: str) -> None:
    """Draw lines of random words into a box.

    Args:
        draw: the image.
        box: (left, top, right, bottom) in pixels.
        size: font size in pixels.
        seed: seed of the words.
        color: color of the text.
    """
    left, top, right, bottom = box
    choices, font = np.random.default_rng(seed), ImageFont.load_default(size)
    for y in range(top, bottom - size, size * 3 // 2):
        line = ""
        while draw.textlength(line, font) < 0.8 * (right - left):
            line += " " + str(choices.choice(WORDS))
        draw.text((left, y), line.strip(), fill=color, font=font)


def draw_page() -> Image.Image:
    """Return a page of text: A4 at 72 dpi with a heading and two paragraphs."""
    image = Image.new("RGB", (595, 842), "white")
    draw = ImageDraw.Draw(image)
    draw_text(draw, (60, 60, 400, 100), 22, 0, "black")
    draw_text(draw, (60, 130, 480, 400), 12, 1, "black")
    draw_text(draw, (60, 430, 480, 600), 12, 2, "black")
    return image


def draw_form() -> Image.Image:
    """Return a form: a table with rules, and words in a part of its cells."""
    image = Image.new("RGB", (595, 842), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for row in range(19):
        draw.line([(50, 80 + 36 * row), (545, 80 + 36 * row)], fill="black")
        for col in range(4):
            if row < 18 and (row + col) % 3 == 0:
                draw.text((60 + 165 * col, 90 + 36 * row), WORDS[row % len(WORDS)], fill="black", font=font)
    for col in range(4):
        draw.line([(50 + 165 * col, 80), (50 + 165 * col, 80 + 36 * 18)], fill="black")
    return image


def draw_screen(gradient: bool = False) -> Image.Image:
    """Return a screen with a bar, icons and two windows.

    Args:
        gradient: whether the background is a gradient instead of one color.
    """
    image = Image.new("RGB", (1024, 640), "#2a5a8a")
    if gradient:
        ramp = np.linspace(60, 200, 640)[:, None, None] * np.ones((1, 1024, 3)) * [0.4, 0.7, 1.0]
        image = Image.fromarray(ramp.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 610, 1024, 640], fill="#202020")
    for icon in range(8):
        draw.rounded_rectangle([20, 20 + 70 * icon, 60, 60 + 70 * icon], 8, fill=["red", "gold", "white"][icon % 3])
    for left, top, right, bottom, seed in ((120, 60, 640, 480, 3), (560, 220, 980, 580, 4)):
        draw.rectangle([left, top, right, bottom], fill="white", outline="gray")
        draw.rectangle([left, top, right, top + 28], fill="#d0d0d0")
        draw_text(draw, (left + 16, top + 44, right - 16, (top + bottom) // 2), 13, seed, "black")
    return image


def draw_photo() -> Image.Image:
    """Return an image without equal tokens: smooth noise in three colors."""
    noise = np.random.default_rng(5).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(6))


def compress(image: Image.Image) -> Image.Image:
    """Return an image after JPEG compression of quality 75."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer).convert("RGB")


IMAGES: Mapping[str, Callable[[], Image.Image]] = {
    "page of text": draw_page,
    "page of text, JPEG": lambda: compress(draw_page()),
    "form": draw_form,
    "screen": draw_screen,
    "screen, JPEG": lambda: compress(draw_screen()),
    "screen, gradient": lambda: draw_screen(gradient=True),
    "smooth noise": draw_photo,
}
"""The drawn images by name."""


@cache
def build_adapter(depth: int) -> Adapter:
    """Return the adapter of a Qwen2-VL with the tower of Qwen2-VL-7B and a tiny LLM.

    Args:
        depth: number of layers of the tower.
    """
    vision = {"depth": depth, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "patch_size": 14}
    torch.manual_seed(0)
    config = Qwen2VLConfig(vision_config=vision, text_config=build_mrope_config(), **MROPE_IDS)
    return find_adapter(Qwen2VLForConditionalGeneration(config).eval())


def process(image: Image.Image) -> dict[str, Any]:
    """Return the vision inputs of an image."""
    return dict(Qwen2VLImageProcessor()(images=[image], return_tensors="pt"))


def select_tokens(inputs: Mapping[str, Any], threshold: float) -> Selection:
    """Return the tokens of an image that PixelPrune keeps.

    Args:
        inputs: the vision inputs of the image.
        threshold: the threshold of PixelPrune.
    """
    red, green, blue = Qwen2VLImageProcessor().image_std
    reducer = PixelPrune(threshold=threshold, image_std=(red, green, blue))
    return PixelSelector(reducer, build_adapter(1)).select(inputs).selections[0]


def count_flops(inputs: Mapping[str, Any], entering: Sequence[Selection] | None) -> float:
    """Return the FLOPs of the vision tower with `DEPTH` layers.

    Args:
        inputs: the vision inputs of an image.
        entering: the tokens whose patches enter the tower; None encodes all patches.
    """
    flops = []
    for depth in (1, 2):
        with torch.no_grad(), create_flop_counter() as counter:
            build_adapter(depth).encode(inputs, (), truncated=True, entering=entering)
        flops.append(counter.get_total_flops())
    return float(flops[0] + (DEPTH - 1) * (flops[1] - flops[0]))


def main() -> None:
    """Print the table."""
    shares = " | ".join(f"{threshold:g}" for threshold in THRESHOLDS)
    print(f"| image | tokens | {shares} | all tokens | 0 | 0.1 |\n|---|---|{'---|' * (len(THRESHOLDS) + 3)}")
    full_flops: dict[int, float] = {}  # equal for images with equally many tokens
    for name, draw in IMAGES.items():
        inputs = process(draw())
        selections = {threshold: select_tokens(inputs, threshold) for threshold in THRESHOLDS}
        tokens = selections[0.0].geometry.tokens
        dropped = [f"{100 * (1 - selection.kept_tokens / tokens):.1f}" for selection in selections.values()]
        full = full_flops[tokens] = full_flops.get(tokens) or count_flops(inputs, None)
        reduced = [count_flops(inputs, [selections[threshold]]) for threshold in (0.0, 0.1)]
        percent = [f"{100 * flops / full:.1f} %" for flops in reduced]
        print(f"| {name} | {tokens} | {' | '.join(dropped)} | {full / 1e12:.2f} | {' | '.join(percent)} |", flush=True)


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
