"""A client of vLLM's OpenAI-compatible server that sends reduced images as embeddings."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from tokenprune.vision_encoder import VisionEncoder

START = "vllm serve MODEL --enable-mm-embeds"
"""The command that starts a server which accepts embeddings."""


class ServerError(RuntimeError):
    """Raised if the server does not answer, or refuses a request."""


def chat(
    server_url: str,
    images: Sequence[Image.Image],
    question: str,
    encoder: VisionEncoder,
    model: str | None = None,
    api_key: str | None = None,
    timeout: float = 600.0,
    **options: Any,
) -> str:
    """Ask a server a question about images of which only the kept tokens are sent, and return the answer.

    >>> chat("http://127.0.0.1:8000", [image], "What is in the image?", encoder, max_tokens=64, temperature=0)

    Args:
        server_url: the address of the server.
        images: the images, in the order of the prompt.
        question: the question.
        encoder: the vision side of the model that the server runs, with the strategy.
        model: the name of the model; None takes the first model of the server.
        api_key: the key of the server (``--api-key``).
        timeout: seconds to wait for an answer.
        options: further fields of a request, such as `temperature` and `max_tokens`.

    Raises:
        ValueError: if there is no image, or an image keeps no token.
        ServerError: if the server does not answer, does not accept embeddings, or runs another model.
    """
    tensors = encoder.encode(images, question).tensors
    name = model or request_json(join_url(server_url, "models"), None, api_key, timeout)["data"][0]["id"]
    messages = [{"role": "user", "content": build_content(tensors, question)}]
    response = post_chat(server_url, {"model": name, "messages": messages, **options}, api_key, timeout)
    return str(response["choices"][0]["message"]["content"])


def build_content(tensors: Sequence[Tensor], question: str) -> list[dict[str, Any]]:
    """Return the content of a user message: the kept tokens of each image, then the question.

    The result also suits other clients, such as the package `openai`.

    Args:
        tensors: the kept tokens of each image, `[kept, dim]` each.
        question: the question.

    Raises:
        ValueError: if there is no image, or an image has no token.
    """
    if not tensors:
        raise ValueError("there is no image to send; give at least one")
    if empty := [number for number, tensor in enumerate(tensors) if not len(tensor)]:
        raise ValueError(f"image {empty[0]} has no token, but a server requires at least one; use a larger budget")
    parts = [{"type": "image_embeds", "image_embeds": encode_tensor(tensor)} for tensor in tensors]
    return [*parts, {"type": "text", "text": question}]


def encode_tensor(tensor: Tensor) -> str:
    """Return a tensor as base64 text of ``torch.save``, the format that all versions of vLLM read."""
    import torch

    buffer = io.BytesIO()
    torch.save(tensor.detach().cpu().clone(), buffer)  # a copy, because the storage of a view is saved completely
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def post_chat(
    server_url: str, request: dict[str, Any], api_key: str | None = None, timeout: float = 600.0
) -> dict[str, Any]:
    """Send a chat request and return the response of the server.

    Args:
        server_url: the address of the server.
        request: the request, with `model` and `messages`.
        api_key: the key of the server.
        timeout: seconds to wait for the response.

    Raises:
        ServerError: if the server does not answer, does not accept embeddings, or runs another model.
    """
    return request_json(join_url(server_url, "chat/completions"), request, api_key, timeout)


def join_url(server_url: str, path: str) -> str:
    """Return the address of a path of the API; the address of the server may end in ``/v1``."""
    return f"{server_url.rstrip('/').removesuffix('/v1')}/v1/{path}"


def request_json(url: str, body: dict[str, Any] | None, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Return the JSON response of a server.

    Args:
        url: the address.
        body: the JSON body of a POST request; None sends a GET request.
        api_key: the key of the server.
        timeout: seconds to wait for the response.

    Raises:
        ServerError: if the server does not answer, or refuses the request.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urlopen(Request(url, data, headers), timeout=timeout) as response:
            content = json.load(response)
    except HTTPError as error:
        raise ServerError(explain_refusal(url, error.code, error.read().decode(errors="replace"))) from error
    except TimeoutError as error:
        raise ServerError(
            f"the server did not answer {url} within {timeout:g} seconds; set a larger timeout"
        ) from error
    except (URLError, ConnectionError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(f"no server answers {url} ({reason}); start it: {START}") from error
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ServerError(f"the response of {url} is no JSON object; give the address of a vLLM server")
    return content


def explain_refusal(url: str, code: int, text: str) -> str:
    """Return the error text of a refused request in one sentence, with the remedy for common mistakes.

    Args:
        url: the address.
        code: the HTTP status.
        text: the response of the server.
    """
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = text
    message = " ".join(message.split())[:300]
    if "--enable-mm-embeds" in message:
        return f"the server does not accept embeddings; start it with the flag: {START}"
    if "hidden dimension mismatch" in message:
        return f"the encoder belongs to another model than the server runs ({message}); load the encoder from its model"
    return f"the server refused the request to {url} with status {code}: {message or 'no reason given'}"
