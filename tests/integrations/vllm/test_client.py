"""The client of a vLLM server against a loopback server with recorded responses, and prompts of the offline engine."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tokenprune import VisionEncoder
from tokenprune.embedding_file import EmbeddingWriter
from tokenprune.experiments.integrations.vllm import ServerError, build_content, chat, load_prompts, post_chat
from tokenprune.experiments.integrations.vllm.plugin import register
from tokenprune.models import mini
from tokenprune.strategies import HiRED
from tokenprune.testing.tiny_models import random_image

ANSWER = {"choices": [{"message": {"content": "a star"}}]}
REFUSALS = {
    "You must set `--enable-mm-embeds` to input `image_embeds`": "the server does not accept embeddings; start it with",
    "Image embedding hidden dimension mismatch: got 96, but model expects 256. Embedding shape: (1, 4, 96)": (
        "the encoder belongs to another model than the server runs .*got 96, but model expects 256"
    ),
    "At most 0 image(s) may be provided in one prompt.": r"refused the request .* status 400: At most 0 image\(s\)",
}
"""Messages of vLLM 0.32 and the beginning of the error of the client."""


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """Return a function that starts a server with one response, and returns its address and the received bodies."""
    servers = []

    def start(body: bytes, code: int = 200) -> tuple[str, list[Any]]:
        received: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, json.dumps({"data": [{"id": "served-name"}]}).encode())

            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                received.append({**content, "headers": self.headers})
                self.reply(code, body)

            def reply(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Print nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", received

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return VisionEncoder.from_pretrained(str(mini.path()), HiRED(0.2))


def test_chat_sends_the_kept_tokens_and_the_question(serve: Any, encoder: VisionEncoder) -> None:
    url, received = serve(json.dumps(ANSWER).encode())
    images = [random_image(100, 100), random_image(60, 160, 1)]
    assert chat(url, images, "what is it?", encoder, max_tokens=4) == "a star"
    (request,) = received
    assert (request["model"], request["max_tokens"]) == ("served-name", 4)
    *parts, question = request["messages"][0]["content"]
    assert question == {"type": "text", "text": "what is it?"}
    sent = [torch.load(io.BytesIO(base64.b64decode(part["image_embeds"])), weights_only=True) for part in parts]
    expected = encoder.encode(images, "what is it?").tensors
    assert all(torch.equal(*pair) for pair in zip(sent, expected, strict=True))
    assert all(len(part["image_embeds"]) < 6 * tensor.numel() + 4000 for part, tensor in zip(parts, sent, strict=True))


@pytest.mark.parametrize("suffix", ["/", "/v1", "/v1/"])
def test_address_and_key(suffix: str, serve: Any) -> None:
    url, received = serve(json.dumps(ANSWER).encode())
    assert post_chat(url + suffix, {"model": "m"}, api_key="secret") == ANSWER
    assert received[0]["headers"]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_of_the_server_are_explained(message: str, serve: Any) -> None:
    url, _ = serve(json.dumps({"error": {"message": message, "code": 400}}).encode(), 400)
    with pytest.raises(ServerError, match=REFUSALS[message]) as info:
        post_chat(url, {"model": "m", "messages": []})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(("code", "body"), [(500, b"<html>\nfault</html>"), (503, b""), (422, b'{"detail": []}')])
def test_other_refusals_name_the_status(code: int, body: bytes, serve: Any) -> None:
    url, _ = serve(body, code)
    with pytest.raises(ServerError, match=f"refused the request to {url}/v1/chat/completions with status {code}: ."):
        post_chat(url, {})


@pytest.mark.parametrize("body", [b"<html>", b"[]x", b"3"])
def test_a_response_that_is_no_object(body: bytes, serve: Any) -> None:
    url, _ = serve(body)
    with pytest.raises(ServerError, match="is no JSON object; give the address of a vLLM server"):
        post_chat(url, {})


def test_closed_server(serve: Any, encoder: VisionEncoder) -> None:
    with pytest.raises(ServerError, match=r"no server answers http://127.0.0.1:9/v1/models .* vllm serve MODEL"):
        chat("http://127.0.0.1:9", [random_image(56, 56)], "?", encoder)


def test_wrong_images_are_refused_before_a_request(encoder: VisionEncoder) -> None:
    with pytest.raises(ValueError, match="there is no image to encode"):
        chat("http://127.0.0.1:9", [], "?", encoder)
    with pytest.raises(ValueError, match="there is no image to send"):
        build_content([], "?")
    with pytest.raises(ValueError, match="image 1 has no token, but a server requires at least one"):
        build_content([torch.ones(3, 8), torch.ones(0, 8)], "?")


def test_prompts_of_a_file(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 8), torch.randn(5, 8).bfloat16()]
    requests = [{"image": "a.png", "question": "what?"}, {"image": "b.png", "question": None}]
    with EmbeddingWriter(tmp_path / "x.safetensors", {}, requests) as writer:
        for tensor in tensors:
            writer.add(tensor, dict.fromkeys(("asked", "kept", "valid", "encoded", "newlines", "newlines_full"), 0))
        writer.finish()
    prompts = load_prompts(tmp_path / "x.safetensors", "[INST] <image>\n{question} [/INST]")
    assert [prompt["prompt"] for prompt in prompts] == ["[INST] <image>\nwhat? [/INST]", "[INST] <image>\n [/INST]"]
    for prompt, tensor in zip(prompts, tensors, strict=True):
        assert torch.equal(prompt["multi_modal_data"]["image"][0], tensor)
    with pytest.raises(ValueError, match=r"has no \{question\}"):
        load_prompts(tmp_path / "x.safetensors", "USER: <image>")


def test_the_plugin_warns_with_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("vllm")
    other.__version__ = "9.9.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", other)
    with pytest.warns(UserWarning, match=r"does nothing: it was run with vLLM 0\.32\.0, but this is 9\.9\.9"):
        register()


def test_the_vllm_side_imports_no_heavy_library() -> None:
    """The plug-in is imported in each process of vLLM, whose environment has no dependency of tokenprune."""
    code = (
        "import sys, tokenprune.experiments.integrations.vllm.plugin;"
        "print([name for name in ('torch', 'transformers', 'safetensors', 'filelock', 'numpy') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"
