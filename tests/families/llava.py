"""LLaVA-1.5 and LLaVA-NeXT."""

from __future__ import annotations

from functools import partial

from tests.families.base import Family
from tests.tiny import tiny_processor
from tokenprune.models.llava import LlavaAdapter
from tokenprune.models.llava_next import LlavaNextAdapter

FAMILIES = [
    Family("llava", LlavaAdapter, partial(tiny_processor, "llava"), spots=((56, 56),)),
    Family("llava_next", LlavaNextAdapter, partial(tiny_processor, "llava_next")),
]
