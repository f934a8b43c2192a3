"""A real vLLM server gives the greedy tokens of transformers for reduced images, and refuses wrong requests.

The server runs in another environment: ``research/vllm/env.sh FOLDER`` creates it, and the variable
``TOKENPRUNE_VLLM_PYTHON`` names its Python.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from research.vllm.checkpoint import save_checkpoint
from research.vllm.server import run_server
from tokenprune import VisionEncoder
from tokenprune.experiments.integrations.vllm import ServerError, build_content, chat, post_chat
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import random_image

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

LENGTH = 16
QUESTION = "what is in the image?"
SIZES = ((112, 112), (60, 160), (150, 50), (56, 56), (40, 170), (170, 120))
BUDGETS = (0.1, 0.3, 0.6, 1.0)
OPTIONS = ("--max-model-len", "1024", "--max-num-seqs", "8")
EMBEDS = ("--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 2}')
Images = tuple[int, ...]


@pytest.fixture(scope="module")
def python() -> str:
    """Return the Python of the environment with vLLM."""
    if "TOKENPRUNE_VLLM_PYTHON" not in os.environ:
        pytest.skip("TOKENPRUNE_VLLM_PYTHON does not name the Python of an environment with vLLM")
    return os.environ["TOKENPRUNE_VLLM_PYTHON"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny LLaVA-NeXT."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def server(python: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a server that accepts embeddings, with the plug-in, and return its address."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with run_server(python, checkpoint, log, *OPTIONS, *EMBEDS) as url:
        yield url


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    """Return a function that generates with transformers from images by number and a budget."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)

    @cache
    def generate(numbers: Images, budget: float) -> list[int]:
        content = [{"type": "image"} for _ in numbers] + [{"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[[make_image(number) for number in numbers]], text=text, return_tensors="pt")
        options = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
        with torch.no_grad(), HiRED(budget)(model):
            output = model.generate(**inputs, **options, suppress_tokens=[model.config.image_token_id])
        return list(output[0, inputs["input_ids"].shape[1] :].tolist())

    return generate


@pytest.fixture(scope="module")
def ask(server: str, checkpoint: Path) -> Any:
    """Return a function that generates with the server from images by number and a budget."""
    encoders = {budget: VisionEncoder.from_pretrained(str(checkpoint), HiRED(budget)) for budget in BUDGETS}
    image_token = str(AutoProcessor.from_pretrained(checkpoint).tokenizer.convert_tokens_to_ids("<image>"))

    def generate(numbers: Images, budget: float) -> tuple[list[int], int, int]:
        """Return the greedy tokens, the number of image tokens in the prompt of the server, and of sent tokens."""
        tensors = encoders[budget].encode([make_image(number) for number in numbers]).tensors
        message = {"role": "user", "content": build_content(tensors, QUESTION)}
        request = {"model": str(checkpoint), "messages": [message], "temperature": 0, "max_tokens": LENGTH}
        request |= {"min_tokens": LENGTH, "logit_bias": {image_token: -100}, "return_token_ids": True}
        response = post_chat(server, request)
        placeholders = response["prompt_token_ids"].count(int(image_token))
        return response["choices"][0]["token_ids"], placeholders, sum(map(len, tensors))

    return generate


def make_image(number: int) -> Any:
    """Return an image by its number; numbers above `len(SIZES)` repeat the sizes with other content."""
    return random_image(*SIZES[number % len(SIZES)], seed=number)


def check_requests(ask: Any, reference: Any, requests: Sequence[tuple[Images, float]], concurrency: int) -> None:
    """Send requests and compare their tokens with transformers."""
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda request: ask(*request), requests))
    assert all(placeholders == sent for _, placeholders, sent in answers)
    expected = [reference(*request) for request in requests]
    equal = [answer[0] == tokens for answer, tokens in zip(answers, expected, strict=True)]
    print(f"\nconcurrency {concurrency}: {sum(equal)} of {len(equal)} requests equal, {LENGTH} tokens each")
    assert all(equal), [request for request, same in zip(requests, equal, strict=True) if not same]
    assert len({tuple(tokens) for tokens in expected}) > len(expected) / 2  # the answers depend on the images


def test_concurrent_requests_of_different_lengths(ask: Any, reference: Any) -> None:
    """It is the first test: embeddings that the server holds in its cache hide the fault that the plug-in removes."""
    requests = [((number,), budget) for number in range(len(SIZES)) for budget in BUDGETS]
    check_requests(ask, reference, requests, concurrency=8)


def test_two_images_of_different_lengths_in_a_prompt(ask: Any, reference: Any) -> None:
    first = 10 * len(SIZES)  # content that the server has not seen
    requests = [((first + number, first + number + 7), 0.3) for number in range(len(SIZES))]
    check_requests(ask, reference, requests, concurrency=3)


@pytest.mark.parametrize("budget", BUDGETS)
def test_requests_one_after_another(budget: float, ask: Any, reference: Any) -> None:
    first = 20 * len(SIZES)
    check_requests(ask, reference, [((first + number,), budget) for number in range(len(SIZES))], concurrency=1)


def test_chat(server: str, checkpoint: Path) -> None:
    encoder = VisionEncoder.from_pretrained(str(checkpoint), HiRED(0.3))
    answers = {chat(server, [make_image(n)], QUESTION, encoder, temperature=0, max_tokens=8) for n in range(3)}
    assert len(answers) > 1


def test_wrong_hidden_size(server: str, checkpoint: Path) -> None:
    request = {
        "model": str(checkpoint),
        "messages": [{"role": "user", "content": build_content([torch.zeros(4, 96)], "?")}],
    }
    with pytest.raises(ServerError, match=r"belongs to another model .*got 96, but model expects 256"):
        post_chat(server, request)


def test_wrong_model_name(server: str) -> None:
    request = {"model": "other", "messages": [{"role": "user", "content": build_content([torch.zeros(4, 256)], "?")}]}
    with pytest.raises(ServerError, match=r"refused the request .* with status 404: .*other"):
        post_chat(server, request)


def test_more_images_than_the_server_allows(server: str, checkpoint: Path) -> None:
    content = build_content([torch.ones(4, 256)] * 3, "?")
    with pytest.raises(ServerError, match=r"status 400: At most 2 image"):
        post_chat(server, {"model": str(checkpoint), "messages": [{"role": "user", "content": content}]})


def test_server_without_the_flag(python: str, checkpoint: Path, tmp_path: Path) -> None:
    encoder = VisionEncoder.from_pretrained(str(checkpoint), HiRED(0.3))
    with run_server(python, checkpoint, tmp_path / "log.txt", *OPTIONS) as url:  # noqa: SIM117
        with pytest.raises(ServerError, match=r"does not accept embeddings; .* vllm serve MODEL --enable-mm-embeds"):
            chat(url, [make_image(0)], QUESTION, encoder)
    with pytest.raises(ServerError, match=r"no server answers .* start it: vllm serve MODEL"):
        chat(url, [make_image(0)], QUESTION, encoder)
