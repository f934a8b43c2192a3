"""Test that the kept tokens of a dark image with one bright spot are the tokens that show the spot.

The weights of the tower are set so that every layer passes on its input and CLS attends to bright patches. The
processor, vision tower, packing, adapter and strategy are not replaced. If rows and columns of a token grid or tile
grid are swapped, other pixels are kept; two tests swap them and check that the spot is missed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tests.helpers.build import token_boxes
from tests.helpers.oracle import draw_spot, transpose_tokens
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage, Signal
from tokenprune.models.llava import LlavaAdapter
from tokenprune.models.llava_next import LlavaNextAdapter
from tokenprune.reducer import ScoreReducer, TokenReducer
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED
from tokenprune.testing import tiny_models as tiny

SPOTS = [  # image size; center of the spot as fractions of the image, off every diagonal
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
class BrightestReducer(ScoreReducer):
    """Keeps the tokens with the highest brightness in the feature layer of the tower."""

    @property
    def needs(self) -> list[Signal]:
        return [Signal("vision_features", "feature")]

    def score(self, image: EncodedImage) -> Tensor:
        return image.vision_features("feature")[..., 0]


def build_bright_model(family: str) -> Any:
    """Build a tiny model whose feature 0 is the brightness of a patch in every layer; CLS attends to bright patches."""
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


def make_inputs(family: str, size: tuple[int, int], spot: tuple[float, float]) -> Any:
    """Return the inputs of an image whose bright square has about 1/16 of the longer image side."""
    image = draw_spot(size, spot, half=max(2, max(size) // 32))
    return tiny.tiny_processor(family)(images=image, text="USER: <image> what?", return_tensors="pt")


def covers_spot(
    geometry: TileGeometry, kept: Tensor, size: tuple[int, int], spot: tuple[float, float]
) -> tuple[bool, bool]:
    """Return whether kept tokens of the base tile, and of the sub-images, cover the center of the spot."""
    boxes = token_boxes(geometry, size, tiny.TILE)
    y, x = spot[0] * size[0], spot[1] * size[1]
    inside = (boxes[..., 0] <= y) & (y < boxes[..., 2]) & (boxes[..., 1] <= x) & (x < boxes[..., 3])
    assert int(inside[0].sum()) == 1
    assert not geometry.sub_images or int(inside[1:].sum()) == 1
    hit = inside & kept
    return bool(hit[0].any()), bool(hit[1:].any())


def read_packed_brightness(
    model: Any, inputs: Any, size: tuple[int, int], selection: Selection
) -> tuple[Tensor, Tensor]:
    """Return the brightness of each packed position, from the packing of the model, and the mask of kept positions."""
    means = avg_pool2d(inputs["pixel_values"][0].mean(dim=1, keepdim=True), tiny.PATCH).flatten(1)[..., None]
    packed, _ = model.model.pack_image_features([means], [size], "default", image_newline=torch.full((1,), -9.0))
    return packed[0][:, 0], selection.packed_mask()


STRATEGIES: list[TokenReducer] = [BrightestReducer(6), HiRED(6), HiRED.paper(8)]


@pytest.mark.parametrize("reducer", STRATEGIES, ids=["scores", "hired", "paper"])
@pytest.mark.parametrize(("size", "spot"), SPOTS)
def test_kept_tokens_show_the_spot_in_llava_next(size, spot, reducer) -> None:
    model, inputs = build_bright_model("llava_next"), make_inputs("llava_next", size, spot)
    with torch.no_grad():
        encoding = LlavaNextAdapter(model).encode(inputs, reducer.needs)
    selection = reducer.reduce(encoding.images[0])
    assert covers_spot(selection.geometry, selection.kept, size, spot) == (True, True)
    brightness, mask = read_packed_brightness(model, inputs, size, selection)
    base = selection.geometry.tokens
    assert bool(mask[:base][brightness[:base].argmax()])
    assert bool(mask[base:][brightness[base:].argmax()])


@pytest.mark.parametrize("reducer", [BrightestReducer(2), HiRED(2)], ids=["scores", "hired"])
@pytest.mark.parametrize("spot", [(0.2, 0.8), (0.8, 0.2), (0.6, 0.1)])
def test_kept_tokens_show_the_spot_in_llava(spot, reducer) -> None:
    model, size = build_bright_model("llava"), (56, 56)
    with torch.no_grad():
        image = LlavaAdapter(model).encode(make_inputs("llava", size, spot), reducer.needs).images[0]
    selection = reducer.reduce(image)
    assert covers_spot(selection.geometry, selection.kept, size, spot)[0]


def transpose_tiles(geometry: TileGeometry) -> TileGeometry:
    """Swap the rows and columns of the tile grid, as the release of HiRED does."""
    rows, cols = geometry.tile_grid
    regions = geometry.regions[:, [1, 0, 3, 2]]
    return replace(geometry, tile_grid=(cols, rows), regions=regions)


@pytest.mark.parametrize(("size", "spot"), SPOTS)
def test_an_exchanged_token_grid_is_noticed(size, spot) -> None:
    """If packed positions are swapped, the brightest positions of base tile and sub-images are not both kept."""
    model, inputs = build_bright_model("llava_next"), make_inputs("llava_next", size, spot)
    reducer = HiRED(6)
    with torch.no_grad():
        image = LlavaNextAdapter(model).encode(inputs, reducer.needs).images[0]
    transposed = replace(image, geometry=transpose_tokens(image.geometry))
    selection = reducer.reduce(transposed)
    brightness, mask = read_packed_brightness(model, inputs, size, selection)
    base = selection.geometry.tokens
    assert not (bool(mask[:base][brightness[:base].argmax()]) and bool(mask[base:][brightness[base:].argmax()]))


@pytest.mark.parametrize(("size", "spot"), [(size, spot) for size, spot in SPOTS if max(size) >= 2 * min(size)])
def test_a_swapped_tile_grid_misses_the_spot(size, spot) -> None:
    """If the tile grid is swapped, the kept tokens do not cover the spot in both base tile and sub-images."""
    model, inputs = build_bright_model("llava_next"), make_inputs("llava_next", size, spot)
    reducer = HiRED(6)
    with torch.no_grad():
        image = LlavaNextAdapter(model).encode(inputs, reducer.needs).images[0]
    assert image.geometry.tile_grid[0] != image.geometry.tile_grid[1]
    selection = reducer.reduce(replace(image, geometry=transpose_tiles(image.geometry)))
    assert covers_spot(selection.geometry, selection.kept, size, spot) != (True, True)


@pytest.mark.parametrize("spot", [(0.2, 0.8), (0.8, 0.2)])
def test_content_follows_the_regions(spot) -> None:
    """HiRED grants most tokens to the sub-image with the spot, or to the opposite corner if regions are swapped."""
    model, inputs = build_bright_model("llava_next"), make_inputs("llava_next", (112, 112), spot)
    reducer = HiRED(20)
    with torch.no_grad():
        image = LlavaNextAdapter(model).encode(inputs, reducer.needs).images[0]
    tile_of_spot = 2 if spot[1] > 0.5 else 3
    assert max(range(1, 5), key=reducer.reduce(image).granted_per_tile.__getitem__) == tile_of_spot
    transposed_selection = reducer.reduce(replace(image, geometry=transpose_tiles(image.geometry)))
    assert max(range(1, 5), key=transposed_selection.granted_per_tile.__getitem__) == 5 - tile_of_spot
