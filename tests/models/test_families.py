"""Checks on all families: generation, loss, pipelines and batches work as in the unmodified model on a shorter prompt.

`tests/core/attach/` tests behavior that all families share in more detail, on LLaVA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.oracle import (
    SPOTS,
    OutlierReducer,
    build_answer,
    collect_state,
    draw_spot,
    generate,
    keeps_spot,
    kept_mask,
    oracle_inputs,
    real_positions,
    remove_positions,
    transpose_tokens,
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
def _skip_unsupported_check(request: pytest.FixtureRequest) -> None:
    """Skip a check that a family cannot pass, with the reason."""
    if "family" in request.fixturenames:
        reason = request.getfixturevalue("family").skip.get(request.node.originalname)
        if reason:
            pytest.skip(reason)


@torch.no_grad()
def test_full_budget_changes_nothing(family: Family, model: Any, inputs: Any) -> None:
    full = model(**inputs).logits
    with HiRED(1.0)(model):
        reduced = model(**inputs).logits
        answer = generate(model, inputs)
        beam_answer = generate(model, inputs, num_beams=2) if family.beams else None
    assert float(full.std()) > 0.3  # large enough to make differences visible
    assert float((full - reduced).abs().max()) <= family.full
    assert torch.equal(model(**inputs).logits, full)
    assert torch.equal(answer, generate(model, inputs))
    if beam_answer is not None:
        assert torch.equal(beam_answer, generate(model, inputs, num_beams=2))


@torch.no_grad()
def test_full_budget_changes_nothing_in_bfloat16(family: Family, inputs: Any) -> None:
    model = family.model(torch.bfloat16)
    cast = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    full = model(**cast).logits
    with HiRED(1.0)(model):
        assert float((model(**cast).logits - full).abs().max()) <= family.full * 2**16
    with HiRED(0.2)(model, outputs="reduced") as run:
        reduced = model(**cast).logits
    assert reduced.shape[1] < full.shape[1]
    assert bool(reduced[real_positions(model, inputs, run)].isfinite().all())


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_logits_equal_the_mask_oracle(family: Family, model: Any, inputs: Any, positions: str) -> None:
    with HiRED(0.2, positions=positions)(model, outputs="reduced") as run:
        reduced = model(**inputs).logits
    assert all(0 < selection.kept_tokens < selection.geometry.valid.sum() for selection in run.selections)
    full = model(**oracle_inputs(model, inputs, run, positions)).logits
    assert reduced.shape[1] < full.shape[1]
    difference = reduced[real_positions(model, inputs, run)] - full[kept_mask(model, inputs, run)]
    assert bool(difference.isfinite().all())
    if family.oracle is not None:
        assert float(difference.abs().max()) < family.oracle


@torch.no_grad()
def test_logits_without_kept_tokens_equal_the_mask_oracle(family: Family, model: Any, inputs: Any) -> None:
    with HiRED(0)(model, outputs="reduced") as run:
        reduced = model(**inputs).logits
    assert not any(selection.kept_tokens for selection in run.selections)
    full = model(**oracle_inputs(model, inputs, run, "reindex")).logits
    difference = reduced[real_positions(model, inputs, run)] - full[kept_mask(model, inputs, run)]
    assert bool(difference.isfinite().all())
    if family.oracle is not None:
        assert float(difference.abs().max()) < family.oracle


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_each_row_equals_itself_alone(family: Family, model: Any, inputs: Any, positions: str) -> None:
    """A row does not depend on other rows: different aspect ratios, two images, and a text-only row."""
    with HiRED(0.2, positions=positions)(model):
        batch_answers = generate(model, inputs)
    with HiRED(0.2, positions=positions)(model, outputs="reduced") as run:
        batch_logits = model(**inputs).logits
    mask, count = real_positions(model, inputs, run), 0
    for number, row in enumerate(family.rows):
        if row:
            row_inputs = family.batch(row, first=number)
            with HiRED(0.2, positions=positions)(model, outputs="reduced") as row_run:
                logits, answer = model(**row_inputs).logits, generate(model, row_inputs)
            for selection in row_run.selections[: len(row)]:
                assert torch.equal(selection.kept, run.selections[count].kept)
                count += 1
        else:  # a text-only row runs without a reducer; some processors cannot build it as a separate batch
            real = inputs["attention_mask"][number].bool()
            text_keys = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
            row_inputs = {name: inputs[name][number : number + 1, real] for name in text_keys if name in inputs}
            logits, answer = model(**row_inputs).logits, generate(model, row_inputs)
        assert float((logits[0] - batch_logits[number][mask[number]]).abs().max()) < 1e-4
        assert torch.equal(answer[0, -6:], batch_answers[number, -6:])
    assert count == sum(map(len, family.rows))


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_ways_of_generating(family: Family, model: Any, inputs: Any, positions: str) -> None:
    """All greedy methods return equal answers, sampling and beams run, and each output starts with the full prompt."""
    answers = {}
    with HiRED(0.2, positions=positions)(model):
        for method, arguments in GENERATION.items():
            if (method == "beams" and not family.beams) or method in family.skip:
                continue
            answers[method] = generate(model, inputs, **arguments)
            assert torch.equal(answers[method][:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    for method in {"static cache", "no cache", "chunked prefill"} & set(answers):
        assert torch.equal(answers[method], answers["greedy"]), method


def test_loss_is_that_of_the_masked_prompt(family: Family, model: Any) -> None:
    inputs = family.batch(*family.rows[:2])
    first = inputs["attention_mask"].cumsum(1) == 1  # the model would predict this token from padding
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | first, -100)
    with torch.no_grad():
        full = model(**inputs, labels=labels).loss
        with HiRED(1.0)(model):
            assert float((model(**inputs, labels=labels).loss - full).abs()) <= family.full
        with HiRED(0.2)(model) as run:
            reduced = model(**inputs, labels=labels).loss
        kept = kept_mask(model, inputs, run)
        oracle = oracle_inputs(model, inputs, run, "reindex")
        logits = model(**oracle).logits
    if family.oracle is None:
        assert bool(reduced.isfinite())
        return
    losses = []
    for row_logits, row_kept, row_labels in zip(logits, kept, labels, strict=True):
        losses.append(
            torch.nn.functional.cross_entropy(row_logits[row_kept][:-1], row_labels[row_kept][1:], reduction="none")
        )
    assert float((reduced - torch.cat(losses).mean()).abs()) < 1e-4


def test_nothing_is_left_behind(family: Family, model: Any, inputs: Any) -> None:
    before = collect_state(model)
    with torch.no_grad():
        generate(model, inputs)
        before = collect_state(model)
        with HiRED(0.2)(model):
            generate(model, inputs)
            assert collect_state(model) != before
        assert collect_state(model) == before
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), HiRED(0.2)(model):
        model(**inputs)
    hook.remove()
    assert collect_state(model) == before
    with pytest.raises(KeyboardInterrupt), HiRED(0.2)(model):
        raise KeyboardInterrupt
    assert collect_state(model) == before


def test_pipeline(family: Family, model: Any) -> None:
    answer = build_answer(model, family.processor(), random_image(*family.sizes[1]), family.text(1))
    before = answer()
    with HiRED(1.0)(model):
        assert answer() == before
    with UniformStride(2)(model) as run:
        reduced = answer()
    assert run.account.kept == 2
    assert SENTENCES[1] not in reduced  # the question; a random model can generate single words of the prompt


# --- kept tokens show the bright spot ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_without_positions(family: Family) -> Any:
    return remove_positions(family.model())


@pytest.mark.parametrize("spot", SPOTS)
@torch.no_grad()
def test_kept_tokens_show_the_bright_spot(
    family: Family, model_without_positions: Any, spot: tuple[float, float]
) -> None:
    """The tokens of the spot are outliers in the LLM inputs, in the output of the feature layer, and in attention."""
    adapter = find_adapter(model_without_positions)
    kinds = ["features", *sorted({"vision_features", "cls_attention", "received_attention"} & adapter.provides)]
    for size in family.spots:
        inputs = family.inputs([[draw_spot(size, spot)]], [family.text(1)])
        for kind in kinds:
            image = adapter.encode(inputs, OutlierReducer(kind=kind).needs).images[0]
            selection = OutlierReducer(2 * image.geometry.tiles, kind=kind).reduce(image)
            assert keeps_spot(selection, spot) == (True, True), (size, kind)


@dataclass
class Brightness(SaliencyModel):
    """A saliency model whose attention is the brightness of the pixels."""

    @property
    def name(self) -> str:
        return "Brightness"

    def compute_attention(
        self, images: Tensor, token_grid: tuple[int, int], layers: Sequence[LayerChoice]
    ) -> SaliencyOutput:
        brightness = torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), token_grid)
        return SaliencyOutput({0: brightness.flatten(2)}, 1, 0, 0)


@pytest.mark.parametrize("spot", SPOTS)
@torch.no_grad()
def test_a_saliency_model_sees_the_bright_spot(family: Family, model: Any, spot: tuple[float, float]) -> None:
    """The saliency model receives the tiles that the tokens represent, base tile first."""
    adapter, saliency_model = find_adapter(model), Brightness(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for size in family.spots:
        inputs = family.inputs([[draw_spot(size, spot)]], [family.text(1)])
        tiles = adapter.encode(inputs, ()).images[0].geometry.tiles
        with OutlierReducer(2 * tiles, attention=saliency_model, kind="cls_attention")(model) as run:
            model(**inputs)
        assert run.account.attention == "Brightness"
        assert keeps_spot(run.selections[0], spot) == (True, True), size


@torch.no_grad()
def test_an_exchanged_token_grid_is_noticed(family: Family, model_without_positions: Any) -> None:
    """If rows and columns of the layout are exchanged, the check of the bright spot fails."""
    adapter, size, results = find_adapter(model_without_positions), family.spots[0], list[tuple[bool, bool]]()
    for spot in SPOTS:
        image = adapter.encode(family.inputs([[draw_spot(size, spot)]], [family.text(1)]), ()).images[0]
        layouts = image.geometry, transpose_tokens(image.geometry)
        order, wrong_order = (layout.packed[layout.packed >= 0] for layout in layouts)
        flat = torch.zeros_like(image.features).flatten(0, 1)
        flat[wrong_order] = image.features.flatten(0, 1)[order]
        transposed_image = replace(image, features=flat.view_as(image.features))
        results.append(keeps_spot(OutlierReducer(1 + bool(image.geometry.sub_images)).reduce(transposed_image), spot))
    assert any(result != (True, True) for result in results)
