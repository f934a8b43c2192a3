"""Reduce a batch: several images and questions in one `generate` call.

Run it: ``python examples/batch_of_images.py``
"""

from PIL import ImageOps

from tokenprune.experiments.evaluation.loading import load
from tokenprune.image_files import load_image
from tokenprune.models import mini
from tokenprune.strategies import HiRED


def main(budget: float = 0.2) -> None:
    """Answer one question about three versions of the board.

    Args:
        budget: share of the visual tokens to keep.
    """
    model, processor = load("mini", "auto", "auto")
    board = load_image(mini.image_path())
    images = [board, ImageOps.mirror(board), board.resize((board.width // 2, board.height))]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many shapes are there?"}]}]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True)] * len(images)
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs = inputs.to(model.device, model.dtype)
    with HiRED(budget)(model, tokenizer=processor) as run:
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for text, image in zip(texts, run.account.images, strict=True):
        print(f"{text.strip()}: {image.kept} of {image.valid} tokens, per tile {list(image.kept_per_tile)}")


if __name__ == "__main__":
    main()
