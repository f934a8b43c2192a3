"""Adds signals to encoded images that do not come from the vision tower: saliency models and the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tokenprune.adapter import Adapter, Encoding
from tokenprune.capabilities import ReadsQuestion, ShowsTiles, require_capability
from tokenprune.image import TEXT_SIGNALS, EncodedImage
from tokenprune.layers import resolve_layers
from tokenprune.saliency import SaliencyModel, list_attention_layers, with_cls_substitute, with_saliency

if TYPE_CHECKING:
    from tokenprune.reducer import TokenReducer


class SignalReader:
    """Adds the signals of a saliency model and of the question to encoded images.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
        signal: the kind of signal that replaces CLS attention, or ``"saliency_model"``.
        question: the question of all prompts, or one per prompt row; None reads it from the prompt.
        tokenizer: decodes the prompt; None loads the tokenizer from the folder or hub id of the model.
    """

    def __init__(
        self,
        reducer: TokenReducer,
        adapter: Adapter,
        signal: str,
        question: str | Sequence[str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.reducer, self.adapter, self.signal = reducer, adapter, signal
        readers = [part for part in reducer.list_parts() if not part.stage.reduces_patches]
        self.needs = [need for part in readers for need in part.needs]
        """The signals that are read after the vision tower has run."""
        self.question, self.tokenizer = question, tokenizer

    def add_attention(self, encoding: Encoding) -> tuple[list[EncodedImage], int]:
        """Return the images with the signal that replaces CLS attention, and the FLOPs of the saliency model."""
        source, needs = self.reducer.attention, self.needs
        count = len(encoding.images) // encoding.repeats
        unique = encoding.images[:count]
        if not isinstance(source, SaliencyModel) or not list_attention_layers(needs):
            return [with_cls_substitute(image, needs, self.signal) for image in unique] * encoding.repeats, 0
        adapter = require_capability(self.adapter, ShowsTiles)
        tiles = adapter.read_tiles(encoding.inputs, [image.geometry for image in unique])
        is_set = source.image_mean is not None and source.image_std is not None
        mean, std = (source.image_mean, source.image_std) if is_set else adapter.pixel_mean_std()
        images, total = [], 0
        for image, pixels in zip(unique, tiles, strict=True):
            shift, scale = (pixels.new_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
            colors = (pixels.float() * scale + shift).clamp(0, 1)
            salient, flops = with_saliency(image, source, colors, needs)
            images.append(salient)
            total += flops
        return images * encoding.repeats, total

    def add_questions(
        self, images: list[EncodedImage], inputs: Mapping[str, Any], row_of_image: Sequence[int], rows: int
    ) -> list[EncodedImage]:
        """Return the images with the question signals of their prompt row; unchanged if the strategy reads none.

        Raises:
            ValueError: if a prompt row has no question, or the number of questions differs from the number of rows.
        """
        needs = [signal for signal in self.needs if signal.kind in TEXT_SIGNALS]
        if not needs:
            return images
        questions = self._read_questions(inputs, rows)
        adapter = require_capability(self.adapter, ReadsQuestion)
        vectors = {text: adapter.embed_question(text, self.reducer.text_model) for text in dict.fromkeys(questions)}
        images_with_question: dict[tuple[EncodedImage, str], EncodedImage] = {}
        for image, row in zip(images, row_of_image, strict=True):
            text = questions[row]
            if (image, text) not in images_with_question:
                signals = {
                    (signal.kind, layer): vectors[text][signal.kind]
                    for signal in needs
                    for layer in resolve_layers(signal.layer, image.layers, image.feature_layer)
                }
                images_with_question[image, text] = image.with_signals(signals)
        return [images_with_question[i, questions[row]] for i, row in zip(images, row_of_image, strict=True)]

    def _read_questions(self, inputs: Mapping[str, Any], rows: int) -> list[str]:
        """Return the question of each prompt row."""
        if self.question is not None:
            questions = [self.question] * rows if isinstance(self.question, str) else list(self.question)
            if len(questions) != rows:
                raise ValueError(
                    f"{len(questions)} questions were given for a batch of {rows} prompts; give one per row"
                )
        elif inputs.get("input_ids") is None:
            raise ValueError(
                f"{type(self.reducer).__name__} reads the question, but inputs_embeds hold no text; "
                "attach with reducer(model, question=...)"
            )
        else:
            adapter = require_capability(self.adapter, ReadsQuestion)
            questions = adapter.read_questions(inputs["input_ids"], inputs.get("attention_mask"), self.tokenizer)
        for row, text in enumerate(questions):
            if not text.strip():
                raise ValueError(
                    f"prompt row {row} holds no question besides its images, but {type(self.reducer).__name__} reads "
                    "the question; attach with reducer(model, question=...)"
                )
        return questions
