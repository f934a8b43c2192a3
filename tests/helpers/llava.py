"""A batch of LLaVA with rows of different lengths, and methods of generation."""

from __future__ import annotations

POSITIONS = ["reindex", "preserve"]
SQUARE, WIDE, TALL, BAND = (112, 112), (60, 160), (150, 50), (40, 170)
ROWS = ([SQUARE], [WIDE, TALL], [], [BAND])
"""Different aspect ratios, several images in a row, and a row without an image."""
TWO_ROWS = ([SQUARE], [WIDE, TALL])

GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.9},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 7},
}
