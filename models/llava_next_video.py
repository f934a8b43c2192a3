"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; frames of videos in the same call are not reduced."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.models.llava_next import LlavaNextAdapter


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """`LlavaNextVideoForConditionalGeneration`: images, with or without videos."""

    family: ClassVar[str] = "llava_next_video"
    model_class: ClassVar[str] = "LlavaNextVideoForConditionalGeneration"
    supports_image_embeds: ClassVar[bool] = False
