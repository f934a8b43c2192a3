"""The text tower of a CLIP checkpoint: embeds questions and visual tokens in one shared space."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from tokenprune.models import mini

MIN_SIMILARITY = 0.99
"""Cosine of the patch embeddings of two vision towers below which they count as different towers."""


class TextTowerWarning(UserWarning):
    """A text tower belongs to another vision tower than that of the model."""


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Disable the progress bars of transformers inside the block."""
    is_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_enabled:
            logging.enable_progress_bar()


class TextTower:
    """The text tower and the projections of a CLIP checkpoint, without its vision tower; runs in float32.

    Args:
        name: a folder or a hub id of a `CLIPModel`, or the name of an embedded model.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        folder = str(mini.text_path(name)) if name in mini.MODELS else name
        try:
            with without_progress_bars():
                model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            similar = get_close_matches(name, mini.MODELS, n=1, cutoff=0.8)
            hint = f"did you mean {similar[0]!r}? " if similar else ""
            raise ValueError(f"text_model={name!r} could not be loaded as a CLIP model: {hint}{error}") from error
        self.name = name
        self.max_length: int = model.config.text_config.max_position_embeddings
        self.width: int = model.config.vision_config.hidden_size
        self.text: Any = model.text_model
        self.text_projection: nn.Module = model.text_projection
        vision: Any = model.vision_model
        self.patch_embedding: Tensor = vision.embeddings.patch_embedding.weight
        self.norm: nn.Module = vision.post_layernorm
        self.projection: nn.Module = model.visual_projection

    @torch.no_grad()
    def embed(self, text: str, device: torch.device) -> Mapping[str, Tensor]:
        """Return a text in the shared space.

        Long texts are split into segments of the tower's maximum length, each with begin and end token.

        Returns:
            Unnormalized vectors by kind. ``question``: a vector per segment, `[segments, shared]`.
            ``question_tokens``: a vector per text token, `[text_tokens, shared]`. ``question_positions``: a vector per
            position of every segment, padded with id 0 to the maximum length, `[segments, positions, shared]`.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        step = self.max_length - 2
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        pooled, tokens, positions = [], [], []
        self.text.to(device), self.text_projection.to(device)
        for start in range(0, max(len(ids), 1), step):
            part = torch.tensor([[begin, *ids[start : start + step], end]], device=device)
            out = self.text(input_ids=part)
            pooled.append(self.text_projection(out.pooler_output))
            tokens.append(self.text_projection(out.last_hidden_state[0, 1:-1]))
            padded = F.pad(part, (0, self.max_length - part.shape[1]))
            mask = F.pad(torch.ones_like(part), (0, self.max_length - part.shape[1]))
            out = self.text(input_ids=padded, attention_mask=mask)
            positions.append(self.text_projection(out.last_hidden_state))
        vectors = {"question": pooled, "question_tokens": tokens, "question_positions": positions}
        return {kind: torch.cat(parts) for kind, parts in vectors.items()}

    @torch.no_grad()
    def align(self, features: Tensor) -> Tensor:
        """Return hidden states of the vision tower in the shared space, `[..., width]` to `[..., shared]`.

        Raises:
            ValueError: if the width differs from the vision tower of the checkpoint.
        """
        if features.shape[-1] != self.width:
            raise ValueError(
                f"text_model={self.name!r} belongs to a vision tower of width {self.width}, but the model's tower has "
                f"width {features.shape[-1]}; name the CLIP checkpoint that contains the model's tower"
            )
        self.norm.to(features.device), self.projection.to(features.device)
        return self.projection(self.norm(features.float()))

    @torch.no_grad()
    def warn_of_another_tower(self, tower: nn.Module) -> None:
        """Warn if the patch embeddings of the checkpoint's vision tower and of a model's tower are not similar.

        A fine-tuned tower stays similar. Towers with patches of another size are not compared.

        Args:
            tower: the vision tower of the model.
        """
        reference = self.patch_embedding.flatten()
        embeddings = [module.weight for module in tower.modules() if isinstance(module, nn.Conv2d)]
        for weight in embeddings:
            if weight.shape != self.patch_embedding.shape or weight.is_meta:  # accelerate offloads to the meta device
                continue
            similarity = F.cosine_similarity(reference, weight.flatten().to(reference), dim=0)
            if similarity < MIN_SIMILARITY:
                warnings.warn(
                    f"text_model={self.name!r} belongs to another vision tower (cosine of the patch embeddings: "
                    f"{float(similarity):.2f}), so that the relevance of tokens to the question is not meaningful; "
                    "name the CLIP checkpoint that the model's tower comes from",
                    TextTowerWarning,
                    stacklevel=2,
                )


@cache
def load_text_tower(name: str | None) -> TextTower:
    """Return the text tower of a folder, a hub id or an embedded model; it is loaded once per process.

    Raises:
        ValueError: if the name is None, or the checkpoint cannot be loaded.
    """
    if name is None:
        raise ValueError("signals of the question require a text_model; name a CLIP checkpoint")
    return TextTower(name)
