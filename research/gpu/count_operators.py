"""Counts operators and reads of strategies on the emulated accelerator of the tests, and updates `operators.json`.

Run it: ``python -m research.gpu.count_operators``, then ``python -m research.gpu.report > docs/results/gpu.md``

The counts are those of `tests/core/test_host_reads.py`: one call of the LLaVA-NeXT test model with images of one
layout, beyond those of the plain model. Earlier calls have copied the index tables of the layout to the device and have
stored the pixels that are kept for drawing. The counts of an earlier version, ``"before"``, are kept from the file. No
GPU is required.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from research.gpu.report import FOLDER
from tests.helpers.emulated_device import EmulatedDevice, move_model, to_device
from tokenprune.reducer import TokenReducer
from tokenprune.run import DRAWABLE
from tokenprune.selection import Newlines
from tokenprune.strategies import DivPrune, FasterVLM, HiRED, QuestionFirst, VisionZip
from tokenprune.strategies.components.relevance import AttentionRelevance
from tokenprune.strategies.question_first import QuestionFirstSelection
from tokenprune.testing.tiny_models import batch, tiny_model

BUDGET = 0.2
IMAGES = (1, 8)
"""Numbers of images of a call."""
SIZE = (112, 112)
"""Height and width of the images in pixels."""
NEWLINES: tuple[Newlines, ...] = ("keep_rows", "drop", "keep")
"""The counted treatments of newline tokens."""
STRATEGIES: Mapping[str, Callable[..., TokenReducer]] = {
    "HiRED": HiRED,
    "FasterVLM": FasterVLM,
    "VisionZip": VisionZip,
    "DivPrune": DivPrune,
    "QuestionFirst": partial(QuestionFirst, selection=QuestionFirstSelection(relevance=AttentionRelevance())),
}
"""The counted strategies. `QuestionFirst` ranks by attention, because the test model has no text encoder."""


def count_call(model: Any, images: int, reducer: TokenReducer | None = None) -> dict[str, int]:
    """Return the operators and reads of a call.

    Args:
        model: the model on the emulated accelerator.
        images: number of prompts with one image each.
        reducer: the strategy; None for the plain model.
    """
    inputs = dict(batch("llava_next", *[[SIZE]] * images))
    block: AbstractContextManager[Any] = nullcontext() if reducer is None else reducer(model)
    with torch.no_grad(), EmulatedDevice(), block:
        for _ in range(1 + DRAWABLE // images):
            model(**to_device(inputs))
        with EmulatedDevice() as device:  # new tensors, because values of a tensor that were read are kept
            model(**to_device(inputs))
    return {"operators": device.operators.total(), "reads": device.reads.total()}


def count_all(before: Mapping[tuple[int, str, str], Mapping[str, int]]) -> dict[str, Any]:
    """Return the content of `operators.json`.

    Args:
        before: operators and reads of an earlier version, by number of images, newline tokens and strategy.
    """
    model = move_model(tiny_model("llava_next"))
    plain = {images: count_call(model, images) for images in IMAGES}
    counts = []
    for newlines in NEWLINES:
        for images in IMAGES:
            for name, build in STRATEGIES.items():
                reduced = count_call(model, images, build(BUDGET, newlines=newlines))
                after = {kind: number - plain[images][kind] for kind, number in reduced.items()}
                earlier = before.get((images, newlines, name))
                entry = {"images": images, "newlines": newlines, "strategy": name}
                counts.append(entry | ({} if earlier is None else {"before": earlier}) | {"after": after})
    return {
        "model": "LLaVA-NeXT test model",
        "budget": BUDGET,
        "plain": [{"images": images, **numbers} for images, numbers in plain.items()],
        "counts": counts,
    }


def format_result(result: Mapping[str, Any]) -> str:
    """Return the result as JSON with one line for each count.

    Args:
        result: the result of `count_all`.
    """
    fields = []
    for name, value in result.items():
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in value) if isinstance(value, list) else ""
        fields.append(f' "{name}": ' + (f"[\n{lines}\n ]" if lines else json.dumps(value)))
    return "{\n" + ",\n".join(fields) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    parser = ArgumentParser(prog="python -m research.gpu.count_operators", description=__doc__)
    parser.add_argument("--out", default=str(FOLDER / "operators.json"), help="path of the JSON file, which is updated")
    path = Path(parser.parse_args(argv).out)
    counts = json.loads(path.read_text())["counts"] if path.is_file() else []
    before = {(e["images"], e["newlines"], e["strategy"]): e["before"] for e in counts if "before" in e}
    path.write_text(format_result(count_all(before)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
