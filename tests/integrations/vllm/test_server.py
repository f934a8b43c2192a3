"""A real vLLM server gives the greedy tokens of transformers for reduced images, and refuses wrong requests.

The server runs in another environment: ``research/vllm/env.sh FOLDER`` creates it, and the variable
``TOKENPRUNE_VLLM_PYTHON`` names its Python.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from research.vllm.checkpoint import save_checkpoint
from research.vllm.server import build_environment, run_server
from tokenprune import VisionEncoder
from tokenprune.cli.encode import EncodeConfig, write_embeddings
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


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint with its model in transformers."""

    folder: Path
    model: Any
    processor: Any

    @property
    def image_token(self) -> int:
        """The id of the image placeholder."""
        return int(self.model.config.image_token_id)

    @cache  # noqa: B019
    def encoder(self, budget: float) -> VisionEncoder:
        """Return an encoder with a budget."""
        return VisionEncoder.from_pretrained(str(self.folder), HiRED(budget))

    @cache  # noqa: B019
    def generate(self, numbers: Images, budget: float) -> list[int]:
        """Return the greedy tokens of transformers for images by number."""
        content = [{"type": "image"} for _ in numbers] + [{"type": "text", "text": QUESTION}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [[make_image(number) for number in numbers]]
        inputs = self.processor(images=images, text=text, return_tensors="pt")
        options = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
        with torch.no_grad(), HiRED(budget)(self.model):
            output = self.model.generate(**inputs, **options, suppress_tokens=[self.image_token])
        return list(output[0, inputs["input_ids"].shape[1] :].tolist())

    def ask(self, url: str, numbers: Images, budget: float) -> list[int]:
        """Return the greedy tokens of a server for images by number."""
        tensors = self.encoder(budget).encode([make_image(number) for number in numbers]).tensors
        message = {"role": "user", "content": build_content(tensors, QUESTION)}
        request = {"model": str(self.folder), "messages": [message], "temperature": 0, "max_tokens": LENGTH}
        request |= {"min_tokens": LENGTH, "logit_bias": {str(self.image_token): -100}, "return_token_ids": True}
        response = post_chat(url, request, timeout=100)
        assert response["prompt_token_ids"].count(self.image_token) == sum(map(len, tensors))
        return list(response["choices"][0]["token_ids"])

    def check_requests(self, url: str, requests: Sequence[tuple[Images, float]], concurrency: int) -> None:
        """Send requests and compare their tokens with transformers."""
        for budget in {budget for _, budget in requests}:
            self.encoder(budget)  # threads would load it several times
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda request: self.ask(url, *request), requests))
        expected = [self.generate(*request) for request in requests]
        equal = [answer == tokens for answer, tokens in zip(answers, expected, strict=True)]
        print(f"\nconcurrency {concurrency}: {sum(equal)} of {len(equal)} requests equal, {LENGTH} tokens each")
        assert all(equal), [request for request, same in zip(requests, equal, strict=True) if not same]
        assert len({tuple(tokens) for tokens in expected}) > len(expected) / 2  # the answers depend on the images


def make_image(number: int) -> Any:
    """Return an image by its number; numbers above `len(SIZES)` repeat the sizes with other content."""
    return random_image(*SIZES[number % len(SIZES)], seed=number)


def build_model(folder: Path, family: str) -> Model:
    """Save a tiny model of a family, and return it."""
    save_checkpoint(folder, family)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return Model(folder, model, AutoProcessor.from_pretrained(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return a tiny LLaVA-NeXT."""
    return build_model(tmp_path_factory.mktemp("checkpoint"), "llava_next")


@pytest.fixture(scope="module")
def server(python: str, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a server that accepts embeddings, with the plug-in, and return its address."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with run_server(python, model.folder, log, *OPTIONS, *EMBEDS) as url:
        yield url


ALL_REQUESTS = [((number,), budget) for number in range(len(SIZES)) for budget in BUDGETS]


def test_concurrent_requests_of_different_lengths(server: str, model: Model) -> None:
    """It is the first test: embeddings that the server holds in its cache hide the fault that the plug-in removes."""
    model.check_requests(server, ALL_REQUESTS, concurrency=8)


def test_two_images_of_different_lengths_in_a_prompt(server: str, model: Model) -> None:
    first = 10 * len(SIZES)  # content that the server has not seen
    requests = [((first + number, first + number + 7), 0.3) for number in range(len(SIZES))]
    model.check_requests(server, requests, concurrency=3)


@pytest.mark.parametrize("budget", BUDGETS)
def test_requests_one_after_another(budget: float, server: str, model: Model) -> None:
    first = 20 * len(SIZES)
    model.check_requests(server, [((first + number,), budget) for number in range(len(SIZES))], concurrency=1)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl"])
def test_families(family: str, python: str, tmp_path: Path) -> None:
    model = build_model(tmp_path, family)
    with run_server(python, model.folder, tmp_path / "log.txt", *OPTIONS, *EMBEDS) as url:
        # 10 % of the four tokens of an InternVL tile would be no token.
        model.check_requests(url, [request for request in ALL_REQUESTS if request[1] > 0.2], concurrency=4)


OFFLINE = """
import json, sys, vllm
from tokenprune.experiments.integrations.vllm import load_prompts

if __name__ == "__main__":
    folder, file, template, image_token, length = sys.argv[1:]
    options = {"max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True}
    llm = vllm.LLM(folder, dtype="float32", enable_mm_embeds=True, **options)
    tokens = {"max_tokens": int(length), "min_tokens": int(length)}
    sampling = vllm.SamplingParams(temperature=0, logit_bias={int(image_token): -100}, **tokens)
    outputs = llm.generate(load_prompts(file, template), sampling)
    with open("tokens.json", "w") as result:
        json.dump([list(output.outputs[0].token_ids) for output in outputs], result)
"""


def test_offline_engine(python: str, model: Model, tmp_path: Path) -> None:
    """The engine answers a file of `tokenprune encode` whose images have different lengths."""
    files = [str(tmp_path / f"{number}.png") for number in range(len(SIZES))]
    for number, file in enumerate(files):
        make_image(number).save(file)
    out, script = tmp_path / "x.safetensors", tmp_path / "offline.py"
    config = EncodeConfig(model=str(model.folder), reducer=HiRED(0.3), images=files, question=[QUESTION], out=str(out))
    write_embeddings(config)
    script.write_text(OFFLINE)
    content = [{"type": "image"}, {"type": "text", "text": "{question}"}]
    template = model.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    command = [python, str(script), str(model.folder), str(out), template, str(model.image_token), str(LENGTH)]
    process = subprocess.run(command, env=build_environment(), cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    assert tokens == [model.generate((n,), 0.3) for n in range(len(SIZES))]


def test_without_the_plugin_the_engine_stops(python: str, model: Model, tmp_path: Path) -> None:
    """If this fails, vLLM accepts images of different lengths by itself, and the plug-in is not needed."""
    with run_server(python, model.folder, tmp_path / "log.txt", *OPTIONS, *EMBEDS, plugins="") as url:  # noqa: SIM117
        with pytest.raises(ServerError):
            model.check_requests(url, ALL_REQUESTS, concurrency=8)
    assert "data contains inconsistent shapes" in (tmp_path / "log.txt").read_text()


def test_chat(server: str, model: Model) -> None:
    answers = {
        chat(server, [make_image(n)], QUESTION, model.encoder(0.3), temperature=0, max_tokens=8) for n in range(3)
    }
    assert len(answers) > 1


def test_wrong_hidden_size(server: str, model: Model) -> None:
    request = {
        "model": str(model.folder),
        "messages": [{"role": "user", "content": build_content([torch.zeros(4, 96)], "?")}],
    }
    with pytest.raises(ServerError, match=r"belongs to another model .*got 96, but model expects 256"):
        post_chat(server, request)


def test_wrong_model_name(server: str) -> None:
    request = {"model": "other", "messages": [{"role": "user", "content": build_content([torch.zeros(4, 256)], "?")}]}
    with pytest.raises(ServerError, match=r"refused the request .* with status 404: .*other"):
        post_chat(server, request)


def test_more_images_than_the_server_allows(server: str, model: Model) -> None:
    content = build_content([torch.ones(4, 256)] * 3, "?")
    with pytest.raises(ServerError, match=r"status 400: At most 2 image"):
        post_chat(server, {"model": str(model.folder), "messages": [{"role": "user", "content": content}]})


def test_server_without_the_flag(python: str, model: Model, tmp_path: Path) -> None:
    encoder = model.encoder(0.3)
    with run_server(python, model.folder, tmp_path / "log.txt", *OPTIONS) as url:  # noqa: SIM117
        with pytest.raises(ServerError, match=r"does not accept embeddings; .* vllm serve MODEL --enable-mm-embeds"):
            chat(url, [make_image(0)], QUESTION, encoder)
    with pytest.raises(ServerError, match=r"no server answers .* start it: vllm serve MODEL"):
        chat(url, [make_image(0)], QUESTION, encoder)
