"""The families of the test matrix. Llama 3.2 Vision has separate tests, because its prompt is not shortened."""

from __future__ import annotations

from tokenprune.testing import families

REPRESENTATIVES = frozenset(
    {"llava", "llava_next", "llava_onevision", "idefics3", "gemma3", "qwen2_5_vl", "phi4_multimodal"}
)
"""One family per kind of layout: one tile, tiles with newline tokens, pooled tiles, tiles between text, crops, native
resolution with M-RoPE and windows, and features that a context manager passes. Other families run with ``-m slow``."""

FAMILIES = {name: family for name, family in families.FAMILIES.items() if name != "mllama"}
