"""A strategy in one class: keep the tokens that change most between two layers of the vision tower.

Check it: ``tokenprune check examples/write_a_strategy.py:LayerChange``
Run it: ``tokenprune run --reducer examples/write_a_strategy.py:LayerChange --reducer.budget 0.2``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tokenprune import EncodedImage, LayerChoice, ScoreReducer, Signal


@dataclass
class LayerChange(ScoreReducer):
    """Keep the tokens whose features change most after an early layer.

    Args:
        early: the layer to compare with.
    """

    early: LayerChoice = "first"

    @property
    def needs(self) -> Sequence[Signal]:
        """The features of both layers."""
        return (Signal("vision_features", self.early), Signal("vision_features", "feature"))

    def score(self, image: EncodedImage) -> Tensor:
        """Return the distance between the two layers, `[tiles, tokens]`."""
        return (image.vision_features("feature") - image.vision_features(self.early)).norm(dim=-1)
