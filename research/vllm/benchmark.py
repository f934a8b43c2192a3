"""Measures requests per second and time to first token of a vLLM server, with all image tokens and with kept tokens.

Run it: ``python -m research.vllm.benchmark --python FOLDER/bin/python`` (`env.sh` creates FOLDER)

Each request has another image, so that no cache of the server holds its tokens. The images are encoded before the timed
requests; the time of the encoder is reported separately. The settings alternate in each round. With pixels, the server
encodes the images itself.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from PIL import Image

from research.vllm.checkpoint import save_large_tiles
from research.vllm.server import run_server
from tokenprune import VisionEncoder
from tokenprune.experiments.integrations.vllm import build_content
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import random_image

QUESTION = "describe the image in one word please"
OPTIONS = ("--max-model-len", "4096", "--max-num-seqs", "16", "--limit-mm-per-prompt", '{"image": 1}')
Content = list[dict[str, Any]]


def build_pixel_content(image: Image.Image) -> Content:
    """Return the content of a message with the pixels of an image and the question."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]


def build_embedding_content(encoder: VisionEncoder, image: Image.Image) -> Content:
    """Return the content of a message with the kept tokens of an image and the question."""
    return build_content(encoder.encode([image], QUESTION).tensors, QUESTION)


def time_request(url: str, model: str, tokens: int, content: Content) -> tuple[float, int]:
    """Return the time to the first token in seconds, and the length of the prompt.

    Args:
        url: the address of the server.
        model: the name of the model.
        tokens: number of generated tokens.
        content: the content of the message.
    """
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "stream": True}
    body |= {"max_tokens": tokens, "min_tokens": tokens, "stream_options": {"include_usage": True}}
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    began, first, prompt = time.perf_counter(), 0.0, 0
    with urlopen(request, timeout=600) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"] and not first:  # vLLM sends its first chunk with the first token
                first = time.perf_counter() - began
            prompt = (chunk.get("usage") or {}).get("prompt_tokens", prompt)
    return first, prompt


@dataclass(frozen=True)
class Result:
    """The times of one setting in one round.

    Args:
        rate: requests per second.
        first_tokens: time to the first token of each request in seconds.
        prompt_length: mean length of the prompts.
        encoder_seconds: seconds for the content of a message.
    """

    rate: float
    first_tokens: list[float]
    prompt_length: int
    encoder_seconds: float


def measure(
    url: str, model: str, tokens: int, contents: Sequence[Content], concurrency: int, encoder_seconds: float
) -> Result:
    """Return the times of requests.

    Args:
        url: the address of the server.
        model: the name of the model.
        tokens: number of generated tokens of each request.
        contents: the content of each request.
        concurrency: number of requests at a time.
        encoder_seconds: seconds for the content of a message.
    """
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        times = list(pool.map(partial(time_request, url, model, tokens), contents))
    rate = len(contents) / (time.perf_counter() - began)
    prompt_length = round(statistics.mean(prompt for _, prompt in times))
    return Result(rate, [first for first, _ in times], prompt_length, encoder_seconds)


def main() -> None:
    """Run the benchmark and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="the Python of the environment with vLLM")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, default=8, help="requests of a setting in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="generated tokens of a request")
    parser.add_argument("--tile", type=int, default=336)
    parser.add_argument("--width", type=int, default=512, help="hidden size of the LLM")
    parser.add_argument("--layers", type=int, default=8, help="layers of the LLM")
    config = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_large_tiles(folder, config.tile, config.width, config.layers)
        encoders = {b: VisionEncoder.from_pretrained(str(folder), HiRED(b)) for b in [1.0, *config.budgets]}
        builders: dict[str, Callable[[Image.Image], Content]] = {"pixels": build_pixel_content}
        builders |= {f"{100 * b:.0f} %": partial(build_embedding_content, encoder) for b, encoder in encoders.items()}
        results: dict[tuple[str, int], list[Result]] = {}
        seeds = count()
        with run_server(config.python, folder, folder / "log.txt", "--enable-mm-embeds", *OPTIONS) as url:
            for number in range(-1, config.rounds):  # the first round warms up
                for setting, concurrency in product(builders, config.concurrency):
                    side = 2 * config.tile
                    images = [random_image(side, side, next(seeds)) for _ in range(config.requests)]
                    began = time.perf_counter()
                    contents = [builders[setting](image) for image in images]
                    seconds = (time.perf_counter() - began) / len(images)
                    result = measure(url, str(folder), config.tokens, contents, concurrency, seconds)
                    if number >= 0:
                        results.setdefault((setting, concurrency), []).append(result)
    print("| image | prompt tokens | concurrency | requests/s | TTFT, median (s) | encoder, per image (s) |")
    print("|---|---|---|---|---|---|")
    for (setting, concurrency), rounds in results.items():
        rates = [result.rate for result in rounds]
        first_token = statistics.median(first for result in rounds for first in result.first_tokens)
        encoder_time = f"{statistics.median(result.encoder_seconds for result in rounds):.2f}"
        rate = f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"
        encoder_time = "in the server" if setting == "pixels" else encoder_time
        print(
            f"| {setting} | {rounds[0].prompt_length} | {concurrency} | {rate} | {first_token:.2f} | {encoder_time} |"
        )


if __name__ == "__main__":
    main()
