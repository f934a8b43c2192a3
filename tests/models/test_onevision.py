"""LLaVA-OneVision: canvases that the model shrinks, and images that it does not tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import SPOTS, generate, spotted, without_places
from tokenprune.adapter import find_adapter
from tokenprune.image import Signal, TileGeometry
from tokenprune.models.llava_onevision import shrink_signal, shrunk
from tokenprune.strategies import HiRED

FAMILY = FAMILIES["llava_onevision"]


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILY.model()


@torch.no_grad()
def test_shrunk_features_are_those_of_the_model_at_their_nearest_tokens(model: Any) -> None:
    """Each position of the smaller canvas is called by the token at its center, no token twice."""
    adapter, inputs = find_adapter(model), FAMILY.batch([(112, 112)])
    encoding = adapter.encode(inputs, [Signal("projector_inputs")])
    image, layout = encoding.images[0], encoding.images[0].geometry
    assert layout.tile_grid == (2, 2)
    assert len(layout.packed) == 16 + 5 * (5 + 1)  # 8 x 8 tokens became 5 x 5: those of two tiles
    assert int(layout.valid[1:].sum()) == 25
    centers = [0, 2, 4, 5, 7]
    canvas = rearrange(layout.valid[1:], "(r c) (h w) -> (r h) (c w)", r=2, h=4)
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[torch.tensor(centers)[:, None], torch.tensor(centers)] = True
    assert torch.equal(canvas, wanted)
    hidden = adapter.tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[-1]
    whole = model.model.multi_modal_projector(hidden[1:])
    raw = rearrange(whole, "(r c) (h w) d -> 1 d (r h) (c w)", r=2, h=4)
    small = F.interpolate(raw, (5, 5), mode="bilinear")[0].flatten(1).t()
    found = rearrange(image.features[1:], "(r c) (h w) d -> (r h) (c w) d", r=2, h=4)[wanted]
    assert float((found - small).abs().max()) < 1e-5


def test_signals_are_shrunk_as_features_are() -> None:
    """A signal that is linear in the place stays so; attention keeps its sum."""
    whole = TileGeometry.anyres((112, 112), (2, 2), (4, 4), 56)
    layout = shrunk(whole, 2)
    row = rearrange(torch.arange(8.0)[:, None].expand(8, 8), "(r h) (c w) -> (r c) (h w)", r=2, c=2)
    value = torch.cat([torch.zeros(1, 16), row])[:, :, None]
    found = shrink_signal("vision_features", value, whole, layout)[1:][layout.valid[1:]]
    assert torch.allclose(found.round(decimals=4).unique(), (torch.arange(5) + 0.5) * 8 / 5 - 0.5)
    flat = torch.full((5, 3, 16), 1 / 80)
    attention = shrink_signal("received_attention", flat, whole, layout)
    assert float((attention * layout.valid[:, None])[1:].sum()) == pytest.approx(float(flat[1:].sum()))
    assert torch.equal(shrunk(whole, 4).packed, whole.packed)  # few enough: nothing is shrunk
    assert shrink_signal("keys", value, whole, whole) is value


@pytest.mark.parametrize("spot", SPOTS)
@torch.no_grad()
def test_attention_of_a_shrunk_canvas_changes_next_to_the_spot(spot: tuple[float, float]) -> None:
    model = without_places(FAMILY.model())
    adapter, values = find_adapter(model), []
    for image in (spotted((112, 112), spot), Image.new("RGB", (112, 112))):
        given = FAMILY.inputs([[image]], [FAMILY.text(1)])
        image = adapter.encode(given, [Signal("received_attention")]).images[0]
        values.append(image.received_attention("feature").sum(dim=1) * image.geometry.valid)
    change = rearrange((values[0] - values[1])[1:].abs(), "(r c) (h w) -> (r h) (c w)", r=2, h=4)
    row, col = divmod(int(change.flatten().argmax()), 8)
    assert max(abs(row + 0.5 - 8 * spot[0]), abs(col + 0.5 - 8 * spot[1])) <= 1.5


@torch.no_grad()
def test_images_beside_others_are_one_tile_if_the_processor_says_so(model: Any) -> None:
    nested = FAMILY.batch([(112, 112)], [(56, 112), (112, 56)])
    assert nested["batch_num_images"].tolist() == [1, 2]
    layouts = find_adapter(model).layouts(nested)
    assert [one.tiles for one in layouts] == [5, 1, 1]
    assert layouts[1].packed.tolist() == [*range(16), -1]
    flat = {name: value for name, value in nested.items() if name != "batch_num_images"}
    assert [one.tiles for one in find_adapter(model).layouts(flat)] == [5, 3, 3]


@torch.no_grad()
def test_a_wider_limit_in_the_call_shrinks_nothing(model: Any) -> None:
    inputs = {**FAMILY.batch([(112, 112)]), "vision_aspect_ratio": "anyres_max_9"}
    layout = find_adapter(model).layouts(inputs)[0]
    assert bool(layout.valid.all())
    missing = len(layout.packed) - int((inputs["input_ids"] == model.config.image_token_id).sum())
    place = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    ids = inputs["input_ids"]
    more = ids.new_full((1, missing), model.config.image_token_id)
    inputs["input_ids"] = torch.cat([ids[:, :place], more, ids[:, place:]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    before = generate(model, inputs)  # `forward` of the unmodified model does not read the limit
    with HiRED(1.0)(model):
        assert torch.equal(generate(model, inputs), before)
    with HiRED(0.2)(model) as run:
        assert generate(model, inputs).shape == before.shape
    assert run.account.kept == 16
