"""Answer a question about an image with 20 % of the visual tokens, and save an image of the kept tokens.

Run it: ``python examples/quickstart.py`` (the embedded model), or with a checkpoint and a photo:
``python examples/quickstart.py --model llava-hf/llava-v1.6-vicuna-7b-hf --image photo.jpg``
"""

import jsonargparse
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenprune.models import mini
from tokenprune.strategies import HiRED


def main(
    model: str = str(mini.path()),
    image: str = str(mini.image_path()),
    question: str = "How many shapes are there?",
    budget: float = 0.2,
) -> None:
    """Print the answer and the cost, and write the overlay `kept.png`.

    Args:
        model: checkpoint folder or hub id.
        image: image file.
        question: question about the image.
        budget: share of the visual tokens to keep.
    """
    vlm, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")
    with HiRED(budget)(vlm) as run:
        output = vlm.generate(**inputs, max_new_tokens=16, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), run.account)
    run.selections[0].overlay().save("kept.png")


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
