"""ViP-LLaVA."""

from __future__ import annotations

from functools import partial

from tests.helpers.families.base import Family
from tests.helpers.tiny import tiny_processor
from tokenprune.models.vipllava import VipLlavaAdapter

FAMILIES = [Family("vipllava", VipLlavaAdapter, partial(tiny_processor, "llava"), spots=((56, 56),))]
