"""One bright spot in a dark image: the tokens that survive must be those whose pixels contain it.

The tower is set so that every layer hands its input on and CLS attends to bright patches. Everything else is real:
processor, vision tower, packing, adapter, strategy. A token grid or tile grid that is exchanged anywhere would keep
other pixels; two tests exchange them on purpose and see the check fail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tests.helpers.build import token_boxes
from tokenprune.image import EncodedImage, Signal, TileGeometry
from tokenprune.models.llava import LlavaAdapter
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.reducer import ScoreReducer, TokenReducer
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED
from tokenprune.testing import tiny_models as tiny

SPOTS = [  # image size, where the spot's center is, as fractions of the image; off every diagonal
    ((56, 112), (0.2, 0.85)),
    ((112, 56), (0.85, 0.2)),
    ((56, 168), (0.2, 0.65)),
    ((168, 56), (0.65, 0.2)),
    ((112, 112), (0.2, 0.7)),
    ((112, 112), (0.7, 0.2)),
    ((300, 200), (0.82, 0.3)),
    ((200, 300), (0.3, 0.82)),
    ((60, 160), (0.3, 0.9)),
    ((400, 150), (0.9, 0.3)),
]


@dataclass
class Brightest(ScoreReducer):
    """Keeps what the tower's last-but-one layer shows as brightest."""

    @property
    def needs(self) -> list[Signal]:
        return [Signal("vision_features", "feature")]

    def score(self, image: EncodedImage) -> Tensor:
        return image.vision_features("feature")[..., 0]


def bright_model(family: str) -> Any:
    """A tiny model whose feature 0 is the brightness of a patch, in every layer; CLS attends to it."""
    model = tiny.tiny_model(family)
    tower = model.model.vision_tower
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight.zero_()
        tower.embeddings.patch_embedding.weight[0] = 1 / (3 * tiny.PATCH**2)
        tower.embeddings.position_embedding.weight.zero_()
        tower.embeddings.position_embedding.weight[:, 1] = 6.0
        tower.embeddings.class_embedding.zero_()
        for norm in (tower.pre_layrnorm, *(layer.layer_norm1 for layer in tower.encoder.layers)):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        for layer in tower.encoder.layers:
            for linear in (layer.self_attn.out_proj, layer.mlp.fc2, layer.self_attn.q_proj, layer.self_attn.k_proj):
                linear.weight.zero_()
                linear.bias.zero_()
            layer.self_attn.q_proj.bias.fill_(1.0)
            layer.self_attn.k_proj.weight[:, 0] = 8.0
    return model


def image(size: tuple[int, int], spot: tuple[float, float]) -> Image.Image:
    """A dark image with a bright square of a sixteenth of its sides around the spot."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    (y, x), half = (spot[0] * size[0], spot[1] * size[1]), max(2, max(size) // 32)
    pixels[max(0, int(y) - half) : int(y) + half, max(0, int(x) - half) : int(x) + half] = 255
    return Image.fromarray(pixels)


def inputs_of(family: str, size: tuple[int, int], spot: tuple[float, float]) -> Any:
    return tiny.tiny_processor(family)(images=image(size, spot), text="USER: <image> what?", return_tensors="pt")


def shows(geometry: TileGeometry, kept: Tensor, size: tuple[int, int], spot: tuple[float, float]) -> tuple[bool, bool]:
    """Whether a kept token of the base tile, and one of the sub-images, shows the center of the spot."""
    boxes = token_boxes(geometry, size, tiny.TILE)
    y, x = spot[0] * size[0], spot[1] * size[1]
    inside = (boxes[..., 0] <= y) & (y < boxes[..., 2]) & (boxes[..., 1] <= x) & (x < boxes[..., 3])
    assert int(inside[0].sum()) == 1
    assert not geometry.sub_images or int(inside[1:].sum()) == 1
    hit = inside & kept
    return bool(hit[0].any()), bool(hit[1:].any())


def entered_brightness(model: Any, inputs: Any, size: tuple[int, int], selection: Selection) -> tuple[Tensor, Tensor]:
    """The brightness of each packed position, by the model's own packing of pixel means, and which positions stay."""
    means = avg_pool2d(inputs["pixel_values"][0].mean(dim=1, keepdim=True), tiny.PATCH).flatten(1)[..., None]
    packed, _ = model.model.pack_image_features([means], [size], "default", image_newline=torch.full((1,), -9.0))
    return packed[0][:, 0], selection.packed_mask()


STRATEGIES: list[TokenReducer] = [Brightest(6), HiRED(6), HiRED.paper(8)]


@pytest.mark.parametrize("reducer", STRATEGIES, ids=["scores", "hired", "paper"])
@pytest.mark.parametrize(("size", "spot"), SPOTS)
def test_kept_tokens_show_the_spot_in_llava_next(size, spot, reducer) -> None:
    model, inputs = bright_model("llava_next"), inputs_of("llava_next", size, spot)
    with torch.no_grad():
        encoding = LlavaNextAdapter(model).encode(inputs, reducer.needs)
    selection = reducer.reduce(encoding.images[0])
    assert shows(selection.geometry, selection.kept, size, spot) == (True, True)
    brightness, mask = entered_brightness(model, inputs, size, selection)
    base = selection.geometry.tokens
    assert bool(mask[:base][brightness[:base].argmax()])
    assert bool(mask[base:][brightness[base:].argmax()])


@pytest.mark.parametrize("reducer", [Brightest(2), HiRED(2)], ids=["scores", "hired"])
@pytest.mark.parametrize("spot", [(0.2, 0.8), (0.8, 0.2), (0.6, 0.1)])
def test_kept_tokens_show_the_spot_in_llava(spot, reducer) -> None:
    model, size = bright_model("llava"), (56, 56)
    with torch.no_grad():
        image = LlavaAdapter(model).encode(inputs_of("llava", size, spot), reducer.needs).images[0]
    selection = reducer.reduce(image)
    assert shows(selection.geometry, selection.kept, size, spot)[0]


def transposed_tokens(geometry: TileGeometry) -> TileGeometry:
    """The layout with rows and columns of every tile's tokens exchanged."""
    rows, cols = geometry.token_grid
    flat, packed = torch.arange(geometry.tokens).view(rows, cols).t().flatten(), geometry.packed
    place = packed.clamp(min=0)
    moved = place // geometry.tokens * geometry.tokens + flat[place % geometry.tokens]
    return replace(geometry, packed=torch.where(packed < 0, packed, moved))


def transposed_tiles(geometry: TileGeometry) -> TileGeometry:
    """The layout with rows and columns of the tile grid exchanged, as in HiRED's release."""
    rows, cols = geometry.tile_grid
    regions = geometry.regions[:, [1, 0, 3, 2]]
    return replace(geometry, tile_grid=(cols, rows), regions=regions)


@pytest.mark.parametrize(("size", "spot"), SPOTS)
def test_an_exchanged_token_grid_is_noticed(size, spot) -> None:
    """With packed positions exchanged, what enters the LLM is not the spot any more, whatever the mask says."""
    model, inputs = bright_model("llava_next"), inputs_of("llava_next", size, spot)
    reducer = HiRED(6)
    with torch.no_grad():
        image = LlavaNextAdapter(model).encode(inputs, reducer.needs).images[0]
    wrong = replace(image, geometry=transposed_tokens(image.geometry))
    selection = reducer.reduce(wrong)
    brightness, mask = entered_brightness(model, inputs, size, selection)
    base = selection.geometry.tokens
    assert not (bool(mask[:base][brightness[:base].argmax()]) and bool(mask[base:][brightness[base:].argmax()]))


@pytest.mark.parametrize(("size", "spot"), [one for one in SPOTS if max(one[0]) >= 2 * min(one[0])])
def test_an_exchanged_tile_grid_is_noticed(size, spot) -> None:
    """The spot's pixels, read by the exchanged grid, are no pixels of a kept token."""
    model, inputs = bright_model("llava_next"), inputs_of("llava_next", size, spot)
    reducer = HiRED(6)
    with torch.no_grad():
        image = LlavaNextAdapter(model).encode(inputs, reducer.needs).images[0]
    assert image.geometry.tile_grid[0] != image.geometry.tile_grid[1]
    selection = reducer.reduce(replace(image, geometry=transposed_tiles(image.geometry)))
    assert shows(selection.geometry, selection.kept, size, spot) != (True, True)


@pytest.mark.parametrize("spot", [(0.2, 0.8), (0.8, 0.2)])
def test_content_follows_the_regions(spot) -> None:
    """HiRED pays the sub-image that shows the spot; with exchanged regions it would pay the opposite corner."""
    model, inputs = bright_model("llava_next"), inputs_of("llava_next", (112, 112), spot)
    reducer = HiRED(20)
    with torch.no_grad():
        image = LlavaNextAdapter(model).encode(inputs, reducer.needs).images[0]
    right = 2 if spot[1] > 0.5 else 3
    assert max(range(1, 5), key=reducer.reduce(image).granted_per_tile.__getitem__) == right
    wrong = reducer.reduce(replace(image, geometry=transposed_tiles(image.geometry)))
    assert max(range(1, 5), key=wrong.granted_per_tile.__getitem__) == 5 - right
