"""ViP-LLaVA."""

from __future__ import annotations

from functools import partial

from tokenprune.models.vipllava import VipLlavaAdapter
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import tiny_processor

FAMILIES = [Family("vipllava", VipLlavaAdapter, partial(tiny_processor, "llava"), spots=((56, 56),))]
