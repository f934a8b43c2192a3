"""The pixels of images by token, for strategies that act before the vision tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from einops import rearrange
from torch import Tensor

from tokenprune.batch import BatchSelection, BatchSelector
from tokenprune.capabilities import ShowsTiles, require_capability
from tokenprune.geometry import share_layouts
from tokenprune.image import EncodedImage

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter
    from tokenprune.pixel_reducer import PixelReducer


def read_color_scale(reducer: PixelReducer, adapter: Adapter) -> Sequence[float]:
    """Return the factor of each color that maps differences of normalized pixels to the range from 0 to 1.

    Args:
        reducer: the strategy. Without a threshold it compares for equality, and the factors are 1.
        adapter: the adapter of the model.

    Raises:
        ValueError: if the strategy has a threshold, and the model has no processor from which the factors are read.
    """
    if reducer.image_std is not None:
        return reducer.image_std
    if reducer.threshold == 0:
        return (1.0, 1.0, 1.0)
    return require_capability(adapter, ShowsTiles).pixel_mean_std()[1]


class PixelSelector:
    """Selects the tokens of all images of a call by their pixels.

    Args:
        reducer: the strategy.
        adapter: the adapter of the model.
    """

    def __init__(self, reducer: PixelReducer, adapter: Adapter) -> None:
        self._adapter, self._scale = adapter, read_color_scale(reducer, adapter)
        self._selector = BatchSelector(reducer)

    def select(self, inputs: Mapping[str, Any]) -> BatchSelection:
        """Return the selection of each image.

        Args:
            inputs: the vision inputs of the call.
        """
        return self._selector.select(build_pixel_images(self._adapter, inputs, self._scale))


def build_pixel_images(adapter: Adapter, inputs: Mapping[str, Any], scale: Sequence[float]) -> list[EncodedImage]:
    """Return the images of a call with the pixels of each token as features, `[tiles, tokens, 3 * height * width]`.

    Args:
        adapter: the adapter of the model.
        inputs: the vision inputs of the call.
        scale: factor of each color (`read_color_scale`).
    """
    layouts = share_layouts(adapter.layouts(inputs))
    images = require_capability(adapter, ShowsTiles).read_tiles(inputs, layouts)
    return [
        EncodedImage(layout, split_tokens(tiles.float() * tiles.new_tensor(scale).view(-1, 1, 1), layout.token_grid))
        for layout, tiles in zip(layouts, images, strict=True)
    ]


def split_tokens(tiles: Tensor, token_grid: tuple[int, int]) -> Tensor:
    """Return the pixels of each token, `[tiles, tokens, 3 * height * width]`.

    Args:
        tiles: the pixels of an image, `[tiles, 3, height, width]`.
        token_grid: height x width of the tokens of a tile.
    """
    rows, cols = token_grid
    return rearrange(tiles, "tiles c (h y) (w x) -> tiles (h w) (c y x)", h=rows, w=cols)
