"""One matrix over all families: everything that a user does with a model works as before, on a shorter prompt.

What is deeper than that, and the same for all families, is tested on LLaVA in `test_attach.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import pipeline

from tests.families import FAMILIES
from tests.families.base import Family, Size
from tests.tiny import SENTENCES, picture
from tokenprune.adapter import find_adapter
from tokenprune.image import EncodedImage, Signal, TileGeometry
from tokenprune.layers import LayerChoice
from tokenprune.reducer import ScoreReducer
from tokenprune.run import Run
from tokenprune.saliency import SecondLook, Seen
from tokenprune.selection import Selection
from tokenprune.strategies import HiRED, UniformStride

POSITIONS = ["reindex", "preserve"]
GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.9},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 7},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    family = FAMILIES[request.param]
    if not family.adapter.runs():
        pytest.skip("the unmodified model raises in the installed transformers")
    return family


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    model = family.model()
    with torch.no_grad():
        model(**family.batch([family.sizes[0]]))  # transformers installs its own capturing hooks at the first call
    return model


@pytest.fixture(scope="module")
def inputs(family: Family) -> Any:
    return family.batch(*family.rows)


@pytest.fixture(autouse=True)
def _skip(request: pytest.FixtureRequest) -> None:
    """Skip a check that cannot hold for a family, with its reason."""
    if "family" in request.fixturenames:
        reason = request.getfixturevalue("family").skip.get(request.node.originalname)
        if reason:
            pytest.skip(reason)


def generate(model: Any, inputs: Any, **how: Any) -> Tensor:
    """Generate four tokens; a random model would write image placeholders itself, so these are suppressed."""
    torch.manual_seed(0)
    suppress = [find_adapter(model).image_token_id]
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, suppress_tokens=suppress, **how)


def kept_mask(model: Any, inputs: Any, run: Run) -> Tensor:
    """Which positions of the full prompt stay, from the selections alone, bool `[rows, length]`."""
    stays = inputs["attention_mask"].bool().clone()
    placeholders = inputs["input_ids"] == find_adapter(model).image_token_id
    stays[placeholders] = torch.cat([s.packed_mask() for s in run.selections])
    return stays


def oracle_inputs(model: Any, inputs: Any, run: Run, positions: str) -> dict[str, Any]:
    """The full prompt with dropped positions masked, and the position ids that the kept ones have."""
    stays = kept_mask(model, inputs, run)
    adapter = find_adapter(model)
    ids = adapter.counted_positions(stays) if positions == "reindex" else adapter.positions(inputs, generating=False)
    ids = ids.expand(*ids.shape[:-2], *stays.shape)
    return {**inputs, "attention_mask": stays.long(), "position_ids": ids}


def real_of_short(model: Any, inputs: Any, run: Run) -> Tensor:
    """Which positions of the shorter, left-padded prompt are real, bool `[rows, width]`."""
    lengths = kept_mask(model, inputs, run).sum(1)
    width = int(lengths.max())
    return torch.arange(width) >= width - lengths[:, None]


@torch.no_grad()
def test_full_budget_changes_nothing(family: Family, model: Any, inputs: Any) -> None:
    before = model(**inputs).logits
    with HiRED(1.0)(model):
        during = model(**inputs).logits
        written = generate(model, inputs)
        beams = generate(model, inputs, num_beams=2) if family.beams else None
    assert float(before.std()) > 0.3  # differences would show
    assert float((before - during).abs().max()) <= family.full
    assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(written, generate(model, inputs))
    if beams is not None:
        assert torch.equal(beams, generate(model, inputs, num_beams=2))


@torch.no_grad()
def test_full_budget_changes_nothing_in_bfloat16(family: Family, inputs: Any) -> None:
    model = family.model(torch.bfloat16)
    cast = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    before = model(**cast).logits
    with HiRED(1.0)(model):
        assert float((model(**cast).logits - before).abs().max()) <= family.full * 2**16
    with HiRED(0.2)(model, outputs="reduced") as run:
        short = model(**cast).logits
    assert short.shape[1] < before.shape[1]
    assert bool(short[real_of_short(model, inputs, run)].isfinite().all())


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_logits_equal_the_mask_oracle(family: Family, model: Any, inputs: Any, positions: str) -> None:
    with HiRED(0.2, positions=positions)(model, outputs="reduced") as run:
        short = model(**inputs).logits
    assert all(0 < selection.kept_tokens < selection.geometry.valid.sum() for selection in run.selections)
    full = model(**oracle_inputs(model, inputs, run, positions)).logits
    assert short.shape[1] < full.shape[1]
    difference = short[real_of_short(model, inputs, run)] - full[kept_mask(model, inputs, run)]
    assert bool(difference.isfinite().all())
    if family.oracle is not None:
        assert float(difference.abs().max()) < family.oracle


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_each_row_equals_itself_alone(family: Family, model: Any, inputs: Any, positions: str) -> None:
    """Different aspect ratios, two images in a row, a row of text only."""
    with HiRED(0.2, positions=positions)(model):
        written = generate(model, inputs)
    with HiRED(0.2, positions=positions)(model, outputs="reduced") as run:
        together = model(**inputs).logits
    mask, seen = real_of_short(model, inputs, run), 0
    for number, row in enumerate(family.rows):
        if row:
            one = family.batch(row, first=number)
            with HiRED(0.2, positions=positions)(model, outputs="reduced") as alone:
                logits, answer = model(**one).logits, generate(model, one)
            for selection in alone.selections[: len(row)]:
                assert torch.equal(selection.kept, run.selections[seen].kept)
                seen += 1
        else:  # of text only, with nothing attached; some processors make no such prompt by itself
            real = inputs["attention_mask"][number].bool()
            text = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
            one = {name: inputs[name][number : number + 1, real] for name in text if name in inputs}
            logits, answer = model(**one).logits, generate(model, one)
        assert float((logits[0] - together[number][mask[number]]).abs().max()) < 1e-4
        assert torch.equal(answer[0, -4:], written[number, -4:])
    assert seen == sum(map(len, family.rows))


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_ways_of_generating(family: Family, model: Any, inputs: Any, positions: str) -> None:
    """All ways that give one greedy answer agree; the others run; the full prompt comes back in front."""
    answers = {}
    with HiRED(0.2, positions=positions)(model):
        for how, arguments in GENERATION.items():
            if (how == "beams" and not family.beams) or how in family.skip:
                continue
            answers[how] = generate(model, inputs, **arguments)
            assert torch.equal(answers[how][:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    for how in {"static cache", "no cache", "chunked prefill"} & set(answers):
        assert torch.equal(answers[how], answers["greedy"]), how


def test_loss_is_that_of_the_masked_prompt(family: Family, model: Any) -> None:
    inputs = family.batch(*family.rows[:2])
    first = inputs["attention_mask"].cumsum(1) == 1  # would be predicted from padding
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | first, -100)
    with torch.no_grad():
        before = model(**inputs, labels=labels).loss
        with HiRED(1.0)(model):
            assert float((model(**inputs, labels=labels).loss - before).abs()) <= family.full
        with HiRED(0.2)(model) as run:
            short = model(**inputs, labels=labels).loss
        stays = kept_mask(model, inputs, run)
        oracle = oracle_inputs(model, inputs, run, "reindex")
        logits = model(**oracle).logits
    if family.oracle is None:
        assert bool(short.isfinite())
        return
    losses = []
    for row, keep, wanted in zip(logits, stays, labels, strict=True):
        losses.append(torch.nn.functional.cross_entropy(row[keep][:-1], wanted[keep][1:], reduction="none"))
    assert float((short - torch.cat(losses).mean()).abs()) < 1e-4


def traces(model: Any) -> list[Any]:
    """Everything that an attached reducer could leave behind."""
    hooks = [
        (n, list(m._forward_pre_hooks), list(m._forward_hooks), id(vars(m).get("config")))
        for n, m in model.named_modules()
    ]
    return [*hooks, sorted(model.__dict__), model.__dict__.get("generate")]


def test_nothing_is_left_behind(family: Family, model: Any, inputs: Any) -> None:
    before = traces(model)
    with torch.no_grad():
        generate(model, inputs)
        before = traces(model)
        with HiRED(0.2)(model):
            generate(model, inputs)
            assert traces(model) != before
        assert traces(model) == before
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), HiRED(0.2)(model):
        model(**inputs)
    hook.remove()
    assert traces(model) == before
    with pytest.raises(KeyboardInterrupt), HiRED(0.2)(model):
        raise KeyboardInterrupt
    assert traces(model) == before


def test_pipeline(family: Family, model: Any) -> None:
    pipe = pipeline("image-text-to-text", model=model, processor=family.processor())
    arguments = {
        "images": [picture(*family.sizes[1])],
        "text": family.text(1),
        "generate_kwargs": {"max_new_tokens": 4, "suppress_tokens": [find_adapter(model).image_token_id]},
        "return_full_text": False,
    }
    before = pipe(**arguments)[0]["generated_text"]
    with HiRED(1.0)(model):
        assert pipe(**arguments)[0]["generated_text"] == before
    with UniformStride(2)(model) as run:
        short = pipe(**arguments)[0]["generated_text"]
    assert run.account.kept == 2
    assert SENTENCES[1] not in short  # the question; a random model may well write single words of the prompt


# --- the kept tokens are the right ones -------------------------------------------------------------------------------

SPOTS = [(0.2, 0.85), (0.85, 0.2), (0.7, 0.6)]
"""Where the spot is, as fractions of the picture; off the diagonal, and never on the edge of a token."""


@dataclass
class Odd(ScoreReducer):
    """Keeps the tokens that differ most from the others of their tile."""

    kind: str = "features"

    @property
    def needs(self) -> list[Signal]:
        return [] if self.kind == "features" else [Signal(self.kind, "feature")]

    def score(self, image: EncodedImage) -> Tensor:
        values = image.features if self.kind == "features" else image.read(Signal(self.kind, "feature"))
        values = values.transpose(1, 2) if self.kind.endswith("attention") else values
        valid = image.geometry.valid[..., None]
        middle = values.masked_fill(~valid, torch.nan).nanmedian(dim=1, keepdim=True).values
        return (values - middle).norm(dim=-1) * image.geometry.valid


def spotted(size: Size, spot: tuple[float, float]) -> Image.Image:
    """A dark picture with a bright square around the spot."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    y, x, half = int(spot[0] * size[0]), int(spot[1] * size[1]), 3
    pixels[max(0, y - half) : y + half, max(0, x - half) : x + half] = 255
    return Image.fromarray(pixels)


def without_places(model: Any) -> Any:
    """The model with a vision tower that cannot tell where a patch is: dark patches are all alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("position_embedding", "positional_embedding", "pos_emb")):
                parameter.zero_()
        for name, buffer in model.named_buffers():
            if "inv_freq" in name:  # rotary embeddings
                buffer.zero_()
            if name.endswith("rope.pos_embed"):  # those of timm: sines, then cosines
                buffer.copy_((torch.arange(buffer.shape[-1]) * 2 >= buffer.shape[-1]).to(buffer))
            elif "freqs_ci" in name:  # the same as complex numbers
                buffer.fill_(1.0)
    return model


def token_of(geometry: TileGeometry, spot: tuple[float, float]) -> Tensor:
    """The token of each tile that shows a point of the picture, bool `[tiles, tokens]`; the picture fills its tiles."""
    rows, cols = geometry.token_grid
    y, x = torch.tensor(spot, dtype=torch.float64)
    regions = torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0]]), geometry.regions]).double()
    down = (y - regions[:, 0]) / (regions[:, 2] - regions[:, 0]) * rows
    across = (x - regions[:, 1]) / (regions[:, 3] - regions[:, 1]) * cols
    inside = (down >= 0) & (down < rows) & (across >= 0) & (across < cols)
    flat = down.floor().long().clamp(0, rows - 1) * cols + across.floor().long().clamp(0, cols - 1)
    shown: Tensor = torch.nn.functional.one_hot(flat, rows * cols).bool() & inside[:, None]
    return shown


def transposed(geometry: TileGeometry) -> TileGeometry:
    """The layout with rows and columns of every tile's tokens exchanged."""
    rows, cols = geometry.token_grid
    flat = torch.arange(geometry.tokens).view(rows, cols).t().flatten()
    place = geometry.packed.clamp(min=0)
    moved = place // geometry.tokens * geometry.tokens + flat[place % geometry.tokens]
    return replace(geometry, packed=torch.where(geometry.packed < 0, geometry.packed, moved))


def hits(selection: Selection, spot: tuple[float, float]) -> tuple[bool, bool]:
    """Whether a kept token of the base tile, and one of the sub-images, shows the spot."""
    shown = token_of(selection.geometry, spot)
    assert int(shown[0].sum()) == 1
    assert not selection.geometry.sub_images or int(shown[1:].sum()) == 1
    hit = shown & selection.kept
    return bool(hit[0].any()), not selection.geometry.sub_images or bool(hit[1:].any())


@pytest.fixture(scope="module")
def placeless(family: Family) -> Any:
    return without_places(family.model())


@pytest.mark.parametrize("spot", SPOTS)
@torch.no_grad()
def test_kept_tokens_show_the_bright_spot(family: Family, placeless: Any, spot: tuple[float, float]) -> None:
    """By what enters the LLM, by the output of the feature layer, and by attention: its tokens stand out in each."""
    adapter = find_adapter(placeless)
    kinds = ["features", *sorted({"vision_features", "cls_attention", "received_attention"} & adapter.provides)]
    for size in family.spots:
        given = family.inputs([[spotted(size, spot)]], [family.text(1)])
        for kind in kinds:
            image = adapter.encode(given, Odd(kind=kind).needs).images[0]
            selection = Odd(2 * image.geometry.tiles, kind=kind).reduce(image)
            assert hits(selection, spot) == (True, True), (size, kind)


@dataclass
class Brightness(SecondLook):
    """Attends to what is bright, the opposite of a vision tower: where pixels are is all that it shows."""

    @property
    def name(self) -> str:
        return "Brightness"

    def look(self, pictures: Tensor, token_grid: tuple[int, int], layers: Sequence[LayerChoice]) -> Seen:
        light = torch.nn.functional.adaptive_avg_pool2d(pictures.mean(dim=1, keepdim=True), token_grid)
        return Seen({0: light.flatten(2)}, 1, 0, 0)


@pytest.mark.parametrize("spot", SPOTS)
@torch.no_grad()
def test_a_second_look_sees_the_bright_spot(family: Family, model: Any, spot: tuple[float, float]) -> None:
    """The tiles that another model is shown are those that the tokens stand for, base tile first."""
    adapter, look = find_adapter(model), Brightness(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for size in family.spots:
        given = family.inputs([[spotted(size, spot)]], [family.text(1)])
        tiles = adapter.encode(given, ()).images[0].geometry.tiles
        with Odd(2 * tiles, attention=look, kind="cls_attention")(model) as run:
            model(**given)
        assert run.account.attention == "Brightness"
        assert hits(run.selections[0], spot) == (True, True), size


@torch.no_grad()
def test_an_exchanged_token_grid_is_noticed(family: Family, placeless: Any) -> None:
    """With rows and columns of the layout exchanged, the check of the bright spot fails."""
    adapter, size, seen = find_adapter(placeless), family.spots[0], []
    for spot in SPOTS:
        image = adapter.encode(family.inputs([[spotted(size, spot)]], [family.text(1)]), ()).images[0]
        places, wrong = (one.packed[one.packed >= 0] for one in (image.geometry, transposed(image.geometry)))
        flat = torch.zeros_like(image.features).flatten(0, 1)
        flat[wrong] = image.features.flatten(0, 1)[places]
        moved = replace(image, features=flat.view_as(image.features))
        seen.append(hits(Odd(1 + bool(image.geometry.sub_images)).reduce(moved), spot))
    assert any(one != (True, True) for one in seen)
