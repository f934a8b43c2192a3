"""Encodes and reduces images without the LLM, for a server that runs the LLM in another process or environment."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from tokenprune.account import ImageAccount
from tokenprune.adapter import Adapter
from tokenprune.image import TEXT_SIGNALS
from tokenprune.pipeline import Pipeline
from tokenprune.reducer import TokenReducer
from tokenprune.run import Run
from tokenprune.selection import Selection
from tokenprune.vision_weights import check_family, load_vision_side


@dataclass(frozen=True, eq=False)
class ImageEmbeddings:
    """The visual tokens of images that a server reads in place of the images.

    Args:
        tensors: the kept tokens of each image in the order of the LLM, newline tokens included, `[kept, dim]` each.
        selections: the selection of each image.
    """

    tensors: list[Tensor]
    selections: list[Selection]

    @property
    def accounts(self) -> list[ImageAccount]:
        """The numbers of tokens of each image."""
        return [ImageAccount.from_selection(selection) for selection in self.selections]


class VisionEncoder:
    """The vision side of a model with a strategy: images in, the visual tokens that enter the LLM out.

    The tokens equal those that ``reducer(model)`` passes to the LLM. Calls from several threads are safe.

    >>> encoder = VisionEncoder.from_pretrained("llava-hf/llava-v1.6-mistral-7b-hf", HiRED(0.2), device="cuda")
    >>> encoder.encode([image], ["What is in the image?"]).tensors[0].shape

    Args:
        adapter: the adapter of the model; only its vision side needs weights.
        processor: the processor of the model.
        reducer: the strategy.
        keep_pixels: whether the selections of the first images store their pixels for drawing.

    Raises:
        TypeError: if no server accepts embeddings of the family.
        ValueError: if the strategy reduces tokens inside the LLM, or does not fit the model.
    """

    def __init__(self, adapter: Adapter, processor: Any, reducer: TokenReducer, keep_pixels: bool = False) -> None:
        check_family(adapter)
        if inside := [part.label for part in reducer.list_parts() if part.stage.reads_llm]:
            raise ValueError(
                f"{inside[0]} drops tokens inside the LLM, which the server runs; use a strategy that acts before the "
                "LLM, such as HiRED"
            )
        self.processor = processor
        self._pipeline = Pipeline(reducer, adapter, tokenizer=processor.tokenizer, keep_pixels=keep_pixels)
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str,
        reducer: TokenReducer,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        keep_pixels: bool = False,
    ) -> VisionEncoder:
        """Return an encoder with the vision tower, projector and newline tokens of a checkpoint, without its LLM.

        Args:
            checkpoint: a folder or a hub id.
            reducer: the strategy.
            device: the device of the vision side.
            dtype: the dtype of the weights; None takes the dtype of the checkpoint.
            keep_pixels: whether the selections of the first images store their pixels for drawing.

        Raises:
            ValueError: if the checkpoint cannot be loaded, or the strategy does not fit the model.
            TypeError: if no adapter supports the model, or no server accepts embeddings of its family.
        """
        adapter = load_vision_side(checkpoint, device, dtype)
        return cls(adapter, AutoProcessor.from_pretrained(checkpoint), reducer, keep_pixels)

    @property
    def run(self) -> Run:
        """The record of all calls: `run.selections` and `run.account`."""
        return self._pipeline.run

    @property
    def hidden_size(self) -> int:
        """The width of a visual token, which is the width of the LLM."""
        return int(self._pipeline.adapter.model.config.get_text_config().hidden_size)

    @property
    def image_token(self) -> str:
        """The placeholder of an image in a prompt."""
        return str(self.processor.image_token)

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], questions: str | Sequence[str] | None = None) -> ImageEmbeddings:
        """Return the visual tokens of images that enter the LLM, one tensor `[kept, dim]` per image.

        All images of a call are encoded together.

        Args:
            images: the images.
            questions: the question of all images, or one per image; required if the strategy reads the question.

        Raises:
            ValueError: if there is no image, the questions do not fit the images, or an image keeps no token.
        """
        if not images:
            raise ValueError("there is no image to encode; give at least one")
        reducer = self._pipeline.reducer
        if questions is None and any(signal.kind in TEXT_SIGNALS for signal in reducer.needs):
            raise ValueError(f"{reducer.label} reads the question; give one question per image")
        shared = "" if questions is None else questions
        texts = [shared] * len(images) if isinstance(shared, str) else list(shared)
        if len(texts) != len(images):
            raise ValueError(f"{len(texts)} questions were given for {len(images)} images; give one per image")
        if marked := [text for text in texts if self.image_token in text]:
            raise ValueError(f"the question {marked[0]!r} contains the image placeholder {self.image_token}; remove it")
        inputs = self._build_inputs(images, texts)
        with self._lock:
            call = self._pipeline.prepare(inputs)
            # If no token is dropped, the model itself would encode the images.
            tensors = self._pipeline.encode(inputs).packed if call.features is None else call.features
        if empty := [number for number, tensor in enumerate(tensors) if not len(tensor)]:
            raise ValueError(
                f"{reducer.label} keeps no token of image {empty[0]}, but a server requires at least one per image; "
                "use a larger budget"
            )
        return ImageEmbeddings(tensors, call.selections)

    def _build_inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Any:
        """Return model inputs with a prompt row for each image."""
        inputs = self.processor(
            images=[[image] for image in images],
            text=[f"USER: {self.image_token}\n{question} ASSISTANT:" for question in questions],
            return_tensors="pt",
            padding=True,
        )
        model = self._pipeline.adapter.model
        return inputs.to(model.device, model.dtype)
