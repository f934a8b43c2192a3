"""Answer a question about an image with 20 % of the visual tokens, and save an image of the kept tokens.

Run it: ``python examples/quickstart.py`` (the embedded model), or with a checkpoint and a photo:
``python examples/quickstart.py --model llava-hf/llava-v1.6-vicuna-7b-hf --image photo.jpg``
"""

from __future__ import annotations

from pathlib import Path

import jsonargparse
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenprune.models import mini
from tokenprune.strategies import HiRED


def main(
    model: str | None = None,
    image: Path | None = None,
    question: str = "How many shapes are there?",
    budget: float = 0.2,
    out: Path = Path("kept.png"),
) -> None:
    """Answer a question with a reduced prompt.

    Args:
        model: checkpoint folder or hub id; by default the embedded model.
        image: image file; by default the bundled board.
        question: question about the image.
        budget: share of the visual tokens to keep.
        out: file of the overlay.
    """
    checkpoint = model or mini.path()
    vlm = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto")
    processor = AutoProcessor.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=Image.open(image or mini.image_path()), text=prompt, return_tensors="pt")

    with HiRED(budget)(vlm) as run:
        output = vlm.generate(**inputs, max_new_tokens=16, do_sample=False)

    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    print(run.account)
    run.selections[0].overlay().save(out)
    print(out)


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
