"""Prints the largest difference between reduction inside the LLM and the oracle, for each family and way of generating.

Run it: ``python -m research.decoder_oracle``

The oracle is the unmodified model at the width of the prompt, with a mask in each layer that hides the dropped tokens.
Logits of all steps are compared, in float32, on tiny models with random weights and a batch of four prompts: one image,
two, none, and one, with left padding. Prompt lookup runs on one prompt. One cut keeps 30 % before layer 1; two cuts of
6 layers keep 60 % and 30 %.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.decoder import (
    LargestStates,
    LargestStatesTwice,
    generate_logits,
    hide_dropped,
    load_inputs,
    load_model,
    visible_masks,
)
from tests.helpers.families import FAMILIES
from tokenprune.reducer import TokenReducer

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "3 beams": {"num_beams": 3},
    "sampling x 2": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
REDUCERS: dict[str, tuple[TokenReducer, int]] = {
    "one cut": (LargestStates(), 0),
    "two cuts": (LargestStatesTwice(), 6),
}
"""The strategy, and the number of LLM layers; 0 means as in the family."""


def measure(name: str, reducer: TokenReducer, layers: int, options: dict[str, Any]) -> str:
    """Return the largest difference of the logits of all steps as text; "tokens differ" if a generated token does.

    Args:
        name: name of the family.
        reducer: the strategy.
        layers: number of LLM layers; 0 means as in the family.
        options: arguments of `generate`.
    """
    family, model = FAMILIES[name], load_model(name, layers)
    inputs = family.batch(family.rows[0]) if "prompt_lookup_num_tokens" in options else load_inputs(name)
    with reducer(model) as run:
        tokens, logits = generate_logits(model, inputs, **options)
    with hide_dropped(model, visible_masks(model, inputs, run)):
        expected_tokens, expected = generate_logits(model, inputs, **options)
    if not torch.equal(tokens, expected_tokens):
        return "tokens differ"
    return f"{(logits - expected).abs().nan_to_num(0.0).max():.0e}"


@torch.no_grad()
def main() -> None:
    """Print the table."""
    print(f"| family | strategy | {' | '.join(WAYS)} |\n|---|---|" + "---|" * len(WAYS))
    for name, family in FAMILIES.items():
        if not family.adapter.supports_transformers() or family.oracle is None:
            continue
        for kind, (reducer, layers) in REDUCERS.items():
            cells = [
                ""
                if not family.beams and way in ("3 beams", "sampling x 2")
                else measure(name, reducer, layers, options)
                for way, options in WAYS.items()
            ]
            print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
