"""Build a strategy from components of published methods: HiRED's allocation with three selections.

Run it: ``python examples/mix_components.py``
"""

from tokenprune import compare
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.image_files import load_image
from tokenprune.models import mini
from tokenprune.strategies import HiRED
from tokenprune.strategies.components import MaxMinDiversitySelection, RandomSelection, TopAttentionSelection


def main() -> None:
    """Print a table, and save an overlay of each selection."""
    model, processor = load("mini", "auto", "auto")
    inputs = model_inputs(model, processor, load_image(mini.image_path()), ["How many shapes are there?"], "board.png")
    selections = [TopAttentionSelection(), MaxMinDiversitySelection(), RandomSelection()]
    table = compare(model, inputs, [HiRED(0.2, selection=s) for s in selections], processor=processor)
    print(table)
    for selection, run in zip(selections, table.runs, strict=True):
        file = f"{type(selection).__name__}.png"
        run.overlay().save(file)
        print(file)


if __name__ == "__main__":
    main()
