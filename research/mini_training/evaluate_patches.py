"""Measures what one patch of a number shows: ``python -m research.mini_training.evaluate_patches --checkpoint FOLDER``.

Linear probes read the tens digit, the units digit and the name from the patches of the feature layer that show the tens
digit or the units digit. If a patch of the tens digit reveals the units digit, too, one kept patch is enough to read
the number.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText

from research.mini_training.lessons import make_tiles
from research.mini_training.page_lessons import make_page_lesson
from research.mini_training.train import tower_output
from tokenprune.models import mini
from tokenprune.models.mini.boards import Split
from tokenprune.models.mini.pages import make_page

DIGITS = ("tens", "units")
WORDS = (*DIGITS, "name")
TRAINED_SHARE = 0.75
"""Share of the images that train the probes."""


@torch.no_grad()
def collect_patches(
    model: Any, count: int, first: int = 0, split: Split = "heldout"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the features of the patches of each digit, `[items, width]`, and the words of the items, `[items]`.

    Args:
        model: The model.
        count: Number of pages.
        first: Index of the first page.
        split: Split of the pages.
    """
    features, words = defaultdict(list), defaultdict(list)
    for index in range(first, first + count):
        page = make_page(index, split)
        masks = make_page_lesson(page, separate_digits=True).digit_masks
        patches = tower_output(model, make_tiles([page])[0])[-2][:, 1:]
        for number, item in enumerate(page.items):
            for digit, mask in zip(DIGITS, masks[:, number], strict=True):
                features[digit].append(patches[torch.from_numpy(mask)][0])
            for word, value in zip(WORDS, (*divmod(item.number, 10), item.name), strict=True):
                words[word].append(value)
    return {name: torch.stack(rows) for name, rows in features.items()}, {n: torch.tensor(v) for n, v in words.items()}


def probe_accuracy(features: Tensor, classes: Tensor, steps: int = 300) -> float:
    """Return the share of items of the last images whose class a linear probe reads.

    Args:
        features: The features, `[items, width]`.
        classes: The class of each item, `[items]`.
        steps: Number of training steps.
    """
    torch.manual_seed(0)
    standard = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    end = int(TRAINED_SHARE * len(standard))
    probe = torch.nn.Linear(standard.shape[1], int(classes.max()) + 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(probe(standard[:end]), classes[:end]).backward()
        optimizer.step()
    return (probe(standard[end:]).argmax(1) == classes[end:]).float().mean().item()


def main() -> None:
    """Parse the command line and print the accuracy of each probe."""
    parser = argparse.ArgumentParser(description="What one patch of a number shows.")
    parser.add_argument("--checkpoint", type=Path, default=mini.path("mini-pages"), help="folder of the checkpoint")
    parser.add_argument("--count", type=int, default=150, help="number of pages")
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    features, words = collect_patches(model, options.count)
    n_read = len(words["name"]) - int(TRAINED_SHARE * len(words["name"]))
    for digit, patches in features.items():
        for word, classes in words.items():
            print(f"patch of the {digit} digit: {word} {probe_accuracy(patches, classes):.3f} (n = {n_read})")


if __name__ == "__main__":
    main()
