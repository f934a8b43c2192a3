"""One matrix over all families: everything that a user does with a model works as before, on a shorter prompt.

What is deeper than that, and the same for all families, is tested on LLaVA in `test_attach.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import pipeline

from tests.helpers.families import FAMILIES
from tests.helpers.oracle import (
    SPOTS,
    Odd,
    generate,
    hits,
    kept_mask,
    oracle_inputs,
    real_of_short,
    spotted,
    traces,
    transposed,
    without_places,
)
from tokenprune.adapter import find_adapter
from tokenprune.layers import LayerChoice
from tokenprune.saliency import SaliencyModel, SaliencyOutput
from tokenprune.strategies import HiRED, UniformStride
from tokenprune.testing.families.base import Family
from tokenprune.testing.tiny_models import SENTENCES, random_image

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
        "images": [random_image(*family.sizes[1])],
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
class Brightness(SaliencyModel):
    """Attends to what is bright, the opposite of a vision tower: where pixels are is all that it shows."""

    @property
    def name(self) -> str:
        return "Brightness"

    def look(self, images: Tensor, token_grid: tuple[int, int], layers: Sequence[LayerChoice]) -> SaliencyOutput:
        light = torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), token_grid)
        return SaliencyOutput({0: light.flatten(2)}, 1, 0, 0)


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
