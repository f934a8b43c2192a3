"""Compose a strategy before the LLM with a strategy inside it, and compare both with each one.

Run it: ``python examples/compose_strategies.py``
"""

from tokenprune import compare
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.image_files import load_image
from tokenprune.models import mini
from tokenprune.strategies import FastV, HiRED


def main() -> None:
    """Print a table of four settings, and save the tokens that remain after each stage."""
    model, processor = load("mini", "auto", "auto")
    inputs = model_inputs(model, processor, load_image(mini.image_path()), ["How many shapes are there?"], "board.png")
    before, inside = HiRED(0.4), FastV(layer=2, budget=0.5)
    table = compare(model, inputs, [HiRED(1.0), before, inside, before >> inside], processor=processor)
    print(table)
    table.runs[-1].overlay().save("composed.png")
    print("composed.png")


if __name__ == "__main__":
    main()
