"""PixelPrune: drops tokens whose pixels equal their prediction from tokens above and to the left.

Paper: Wang et al., "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding", arXiv 2604.00886.
Repository: OPPO-Mente-Lab/PixelPrune, commit a870e31.

The prediction of a token is one of its neighbors, as in the lossless image format JPEG-LS (LOCO-I). With the neighbors
A (left), B (above) and C (above A), it is B if C equals A and differs from B (a vertical edge), otherwise A. In the
first row it is A, in the first column B; the first token has no prediction. A token is kept if ``d(token, prediction) >
threshold``, where ``d`` is the largest, mean or root-mean-square difference of the pixels. A dropped token is replaced
by its prediction in later comparisons, so that errors do not add up. Kept tokens keep their positions in the vision
tower and in the LLM.

Differences from the release: a budget can limit the number of tokens. The release compares the tokens of an image one
after another; here all tokens on a diagonal of the grid are compared together. The kept tokens equal those of the
released selector `Pred2DSelector` (`anchored=True`) in six recorded cases.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from tokenprune.image import EncodedImage
from tokenprune.pixel_reducer import PixelReducer

Metric: TypeAlias = Literal["max", "mae", "rmse"]


@dataclass
class PixelPrune(PixelReducer):
    """Drops tokens whose pixels equal their prediction from neighbors, before the vision tower.

    Args:
        metric: difference of the pixels of two tokens: ``"max"`` (largest absolute difference), ``"mae"`` (mean
            absolute difference) or ``"rmse"`` (root mean square).
    """

    published: ClassVar[str] = "arXiv 2604.00886"
    parity: ClassVar[str] = "kept tokens: 6/6 official cases"

    metric: Metric = field(default="max", kw_only=True)

    def error(self, image: EncodedImage) -> Tensor:
        """Return the difference of each token from its prediction, `[tiles, tokens]`."""
        grid = image.geometry.token_grid
        predict = prediction_errors if self.threshold else lossless_errors
        tiles = [tile.unflatten(0, grid) for tile in image.features.float()]
        return torch.stack([predict(tile, self.threshold, self.metric).flatten() for tile in tiles])


def prediction_errors(pixels: Tensor, threshold: float, metric: Metric) -> Tensor:
    """Return the difference of each token from its prediction, `[height, width]`; infinite for the first token.

    The tokens on an anti-diagonal depend on earlier diagonals only and are compared together.

    Args:
        pixels: the pixels of each token, `[height, width, pixels]`.
        threshold: largest error of a token that is replaced by its prediction.
        metric: difference of the pixels of two tokens.
    """
    height, width, _ = pixels.shape
    tokens, rows = pixels.flatten(0, 1), torch.arange(height, device=pixels.device)
    before = previous = torch.zeros_like(rows)  # tokens that represent the last two diagonals, by row
    errors = []
    for diagonal in range(height + width - 1):
        cols = diagonal - rows
        number = rows * width + cols.clamp(0, width - 1)
        above = previous.roll(1)
        left = torch.where(cols > 0, previous, above)
        above = torch.where(rows > 0, above, left)
        corner = torch.where((rows > 0) & (cols > 0), before.roll(1), above)
        use_above = is_vertical_edge(tokens[left], tokens[above], tokens[corner], threshold, metric)
        prediction = torch.where(use_above, above, left)
        error = measure_difference(tokens[number], tokens[prediction], metric)
        error = torch.where(rows + cols.abs() > 0, error, torch.inf)
        errors.append(error)
        before, previous = previous, torch.where(error > threshold, number, prediction)
    return torch.stack(errors)[rows[:, None] + torch.arange(width, device=pixels.device), rows[:, None]]


def lossless_errors(pixels: Tensor, threshold: float, metric: Metric) -> Tensor:
    """Return the result of `prediction_errors` for a threshold of 0, `[height, width]`, in one step.

    A token that is replaced by its prediction then equals it.

    Args:
        pixels: the pixels of each token, `[height, width, pixels]`.
        threshold: 0.
        metric: difference of the pixels of two tokens.
    """
    left, above, corner = pixels[1:, :-1], pixels[:-1, 1:], pixels[:-1, :-1]
    use_above = is_vertical_edge(left, above, corner, threshold, metric)
    errors = pixels.new_full(pixels.shape[:2], torch.inf)
    errors[0, 1:] = measure_difference(pixels[0, 1:], pixels[0, :-1], metric)
    errors[1:, 0] = measure_difference(pixels[1:, 0], pixels[:-1, 0], metric)
    errors[1:, 1:] = measure_difference(pixels[1:, 1:], torch.where(use_above[..., None], above, left), metric)
    return errors


def is_vertical_edge(left: Tensor, above: Tensor, corner: Tensor, threshold: float, metric: Metric) -> Tensor:
    """Return whether the token above the left neighbor equals it and differs from the upper neighbor, bool `[...]`.

    Args:
        left: pixels of the left neighbors, `[..., pixels]`.
        above: pixels of the upper neighbors, `[..., pixels]`.
        corner: pixels of the tokens above the left neighbors, `[..., pixels]`.
        threshold: largest difference of equal tokens.
        metric: difference of the pixels of two tokens.
    """
    equals_left = measure_difference(corner, left, metric) <= threshold
    return equals_left & (measure_difference(corner, above, metric) > threshold)


def measure_difference(first: Tensor, second: Tensor, metric: Metric) -> Tensor:
    """Return the difference of the pixels of pairs of tokens, `[...]`.

    Args:
        first: the pixels of the first tokens, `[..., pixels]`.
        second: the pixels of the second tokens, `[..., pixels]`.
        metric: ``"max"``, ``"mae"`` or ``"rmse"``.
    """
    difference = (first - second).abs()
    if metric == "max":
        return difference.amax(dim=-1)
    return difference.mean(dim=-1) if metric == "mae" else difference.square().mean(dim=-1).sqrt()
