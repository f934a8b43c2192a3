"""Prompts for vLLM's offline engine from a file of embeddings; runs in the environment of vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenprune.embedding_file import read_embeddings

TEMPLATE = "USER: <image>\n{question} ASSISTANT:"
"""The prompt of LLaVA-1.5 and of LLaVA-NeXT with Vicuna."""


def load_prompts(file: str | Path, template: str = TEMPLATE) -> list[dict[str, Any]]:
    """Return a prompt for each entry of a file that ``tokenprune encode`` wrote.

    >>> llm = vllm.LLM(MODEL, enable_mm_embeds=True)
    >>> llm.generate(load_prompts("images.safetensors"), vllm.SamplingParams(max_tokens=64))

    Args:
        file: the file.
        template: the prompt of the model, with one image placeholder of the model and ``{question}``.

    Raises:
        ValueError: if the file was not written by ``tokenprune encode``, or the template has no ``{question}``.
    """
    if "{question}" not in template:
        raise ValueError(f"the template {template!r} has no {{question}}; write the prompt of the model around it")
    return [
        {
            "prompt": template.replace("{question}", entry["question"] or ""),
            "multi_modal_data": {"image": [tensor]},
        }
        for tensor, entry in read_embeddings(file)
    ]
