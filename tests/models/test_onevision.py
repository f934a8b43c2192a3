"""LLaVA-OneVision: canvases that the model shrinks, and images that it encodes as one tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import SPOTS, draw_spot, generate, remove_positions
from tokenprune.adapter import find_adapter
from tokenprune.geometry import TileGeometry
from tokenprune.image import Signal
from tokenprune.models.llava_onevision import shrink_layout, shrink_signal
from tokenprune.strategies import HiRED

FAMILY = FAMILIES["llava_onevision"]


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILY.model()


@torch.no_grad()
def test_shrunk_features_equal_the_model_at_the_nearest_tokens(model: Any) -> None:
    """Each position of the smaller canvas belongs to the token at its center, and no token has two positions."""
    adapter, inputs = find_adapter(model), FAMILY.batch([(112, 112)])
    encoding = adapter.encode(inputs, [Signal("projector_inputs")])
    image, layout = encoding.images[0], encoding.images[0].geometry
    assert layout.tile_grid == (2, 2)
    assert len(layout.packed) == 16 + 5 * (5 + 1)  # 8 x 8 tokens became 5 x 5, at most the tokens of two tiles
    assert int(layout.valid[1:].sum()) == 25
    centers = [0, 2, 4, 5, 7]
    canvas = rearrange(layout.valid[1:], "(r c) (h w) -> (r h) (c w)", r=2, h=4)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[torch.tensor(centers)[:, None], torch.tensor(centers)] = True
    assert torch.equal(canvas, expected)
    hidden = adapter.tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[-1]
    projected = model.model.multi_modal_projector(hidden[1:])
    canvas_features = rearrange(projected, "(r c) (h w) d -> 1 d (r h) (c w)", r=2, h=4)
    shrunk = F.interpolate(canvas_features, (5, 5), mode="bilinear")[0].flatten(1).t()
    features = rearrange(image.features[1:], "(r c) (h w) d -> (r h) (c w) d", r=2, h=4)[expected]
    assert float((features - shrunk).abs().max()) < 1e-5


def test_signals_are_shrunk_like_features() -> None:
    """A signal that is linear in the position stays linear; attention keeps its sum."""
    full_layout = TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56)
    layout = shrink_layout(full_layout, 2)
    row = rearrange(torch.arange(8.0)[:, None].expand(8, 8), "(r h) (c w) -> (r c) (h w)", r=2, c=2)
    value = torch.cat([torch.zeros(1, 16), row])[:, :, None]
    shrunk = shrink_signal("vision_features", value, full_layout, layout)[1:][layout.valid[1:]]
    assert torch.allclose(shrunk.round(decimals=4).unique(), (torch.arange(5) + 0.5) * 8 / 5 - 0.5)
    flat = torch.full((5, 3, 16), 1 / 80)
    attention = shrink_signal("received_attention", flat, full_layout, layout)
    assert float((attention * layout.valid[:, None])[1:].sum()) == pytest.approx(float(flat[1:].sum()))
    assert torch.equal(shrink_layout(full_layout, 4).packed, full_layout.packed)  # few tokens: not shrunk
    assert shrink_signal("keys", value, full_layout, full_layout) is value


@pytest.mark.parametrize("spot", SPOTS)
@torch.no_grad()
def test_attention_of_a_shrunk_canvas_changes_next_to_the_spot(spot: tuple[float, float]) -> None:
    model = remove_positions(FAMILY.model())
    adapter, values = find_adapter(model), []
    for pixels in (draw_spot((112, 112), spot), Image.new("RGB", (112, 112))):
        inputs = FAMILY.inputs([[pixels]], [FAMILY.text(1)])
        image = adapter.encode(inputs, [Signal("received_attention")]).images[0]
        values.append(image.received_attention("feature").sum(dim=1) * image.geometry.valid)
    change = rearrange((values[0] - values[1])[1:].abs(), "(r c) (h w) -> (r h) (c w)", r=2, h=4)
    row, col = divmod(int(change.flatten().argmax()), 8)
    assert max(abs(row + 0.5 - 8 * spot[0]), abs(col + 0.5 - 8 * spot[1])) <= 1.5


@torch.no_grad()
def test_several_images_of_a_row_have_one_tile_if_batch_num_images_is_passed(model: Any) -> None:
    nested = FAMILY.batch([(112, 112)], [(56, 112), (112, 56)])
    assert nested["batch_num_images"].tolist() == [1, 2]
    layouts = find_adapter(model).layouts(nested)
    assert [layout.tiles for layout in layouts] == [5, 1, 1]
    assert layouts[1].packed.tolist() == [*range(16), -1]
    flat = {name: value for name, value in nested.items() if name != "batch_num_images"}
    assert [layout.tiles for layout in find_adapter(model).layouts(flat)] == [5, 3, 3]


@torch.no_grad()
def test_a_larger_limit_in_the_call_prevents_shrinking(model: Any) -> None:
    inputs = {**FAMILY.batch([(112, 112)]), "vision_aspect_ratio": "anyres_max_9"}
    layout = find_adapter(model).layouts(inputs)[0]
    assert bool(layout.valid.all())
    missing = len(layout.packed) - int((inputs["input_ids"] == model.config.image_token_id).sum())
    start = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    ids = inputs["input_ids"]
    placeholders = ids.new_full((1, missing), model.config.image_token_id)
    inputs["input_ids"] = torch.cat([ids[:, :start], placeholders, ids[:, start:]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    before = generate(model, inputs)  # `forward` of the unmodified model does not read the limit
    with HiRED(1.0)(model):
        assert torch.equal(generate(model, inputs), before)
    with HiRED(0.2)(model) as run:
        assert generate(model, inputs).shape == before.shape
    assert run.account.kept == 16
