"""LLaVA-NeXT-Video: pictures as in LLaVA-NeXT; frames of videos beside them are left as they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from tokenprune.adapter import Encoding
from tokenprune.image import Signal
from tokenprune.models.example import example_parts, with_sharp_attention
from tokenprune.models.llava_next import EXAMPLE_GRIDS, LlavaNextAdapter

VIDEOS = "pixel_values_videos"
"""Name of the model input that holds the frames."""


class BesideVideosAdapter(LlavaNextAdapter):
    """A family whose prompts can hold videos, too.

    The model takes pixels or features, not both: videos beside pictures are encoded with them and handed over whole.
    """

    @classmethod
    @abstractmethod
    def example(cls) -> Any:
        """Return a tiny model of the family."""

    @cached_property
    def image_inputs(self) -> frozenset[str]:
        """The vision inputs of the model: what the features replace."""
        return super().image_inputs | {VIDEOS}

    def encode(
        self,
        inputs: Mapping[str, Any],
        needs: Sequence[Signal],
        keep_pixels: int = 0,
        text_model: str | None = None,
        truncated: bool = False,
    ) -> Encoding:
        """Run the vision side once; videos get no signals."""
        encoding = super().encode(without_videos(inputs), needs, keep_pixels, text_model, truncated)
        return replace(encoding, videos=self.encode_videos(inputs))

    def unencoded(self, inputs: Mapping[str, Any], keep_pixels: int = 0) -> Encoding:
        """Return an encoding with layouts and no features; videos are encoded."""
        encoding = super().unencoded(without_videos(inputs), keep_pixels)
        return replace(encoding, videos=self.encode_videos(inputs))

    def encode_videos(self, inputs: Mapping[str, Any]) -> Any:
        """Return the model's own output object of the videos of a call; None if it has none."""
        if inputs.get(VIDEOS) is None:
            return None
        chosen = ("vision_feature_layer", "vision_feature_select_strategy")
        given = {name: inputs[name] for name in (VIDEOS, *chosen) if inputs.get(name) is not None}
        return self.model.base_model.get_video_features(**given, return_dict=True)


def without_videos(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call without its frames."""
    return {name: value for name, value in inputs.items() if name != VIDEOS}


class LlavaNextVideoAdapter(BesideVideosAdapter):
    """`LlavaNextVideoForConditionalGeneration`: pictures, beside videos or alone."""

    family: ClassVar[str] = "llava_next_video"
    model_class: ClassVar[str] = "LlavaNextVideoForConditionalGeneration"

    @classmethod
    def example(cls) -> Any:
        """Return a tiny LLaVA-NeXT-Video."""
        torch.manual_seed(0)
        config = LlavaNextVideoConfig(**example_parts(), image_grid_pinpoints=EXAMPLE_GRIDS, video_token_index=4)
        return with_sharp_attention(LlavaNextVideoForConditionalGeneration(config))
