"""`compare` agrees with the record of each strategy, and public objects show themselves in Jupyter."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image

from tokenprune import AtLayer, Composed, EncodedImage, Selection, TileGeometry, compare
from tokenprune.display import format_table
from tokenprune.experiments.analysis.results import Results, Setting
from tokenprune.experiments.evaluation.loading import load, model_inputs
from tokenprune.image_files import load_image
from tokenprune.models import mini
from tokenprune.strategies import FastV, HiRED, Random
from tokenprune.testing.encoded_images import random_encoded_image


@pytest.fixture(scope="module")
def mini_inputs() -> tuple[Any, Any, Any]:
    """Return the embedded model, its processor, and inputs with the bundled board."""
    model, processor = load("mini", "cpu", "float32")
    inputs = model_inputs(model, processor, load_image(mini.image_path()), ["How many shapes are there?"], "board.png")
    return model, processor, inputs


REDUCERS = [HiRED(1.0), HiRED(0.2), FastV(layer=2, budget=0.5), Composed([HiRED(0.4), FastV(layer=2, budget=0.5)])]


def test_compare_agrees_with_a_run_of_each_strategy(mini_inputs: tuple[Any, Any, Any]) -> None:
    model, processor, inputs = mini_inputs
    table = compare(model, inputs, REDUCERS, processor=processor, max_new_tokens=4)
    assert [row.strategy for row in table.rows] == ["HiRED", "HiRED", "FastV", "HiRED+FastV"]
    for row, reducer in zip(table.rows, REDUCERS, strict=True):
        with reducer(model, tokenizer=processor) as run:
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert row.answers == (text,)
        assert (row.kept, row.valid, row.average_tokens) == (
            run.account.kept,
            run.account.valid,
            run.account.average_tokens,
        )
        assert row.flops_ratio == run.account.flops / run.account.flops_full
        assert row.seconds > 0
    full, reduced, decoder, composed = table.rows
    assert (full.kept, full.kv_ratio, full.flops_ratio) == (full.valid, 1.0, 1.0)
    assert decoder.kept == full.kept > composed.kept > reduced.kept
    assert full.average_tokens > decoder.average_tokens > composed.average_tokens
    assert composed.budget == "40% + 50% from layer 2"


def test_comparison_is_displayed(mini_inputs: tuple[Any, Any, Any]) -> None:
    model, _, inputs = mini_inputs
    table = compare(model, inputs, [Random.seeded(seed=0), AtLayer(2, HiRED(0.5))], max_new_tokens=1)
    assert "answer" not in table.columns
    lines = str(table).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("strategy")
    assert table._repr_html_().count("<tr>") == 3
    assert table.to_dicts()[0]["strategy"] == table.rows[0].strategy
    assert Image.open(io.BytesIO(table.runs[0].selections[0]._repr_png_() or b"")).width > 100


def test_compare_rejects_calls_without_reduction(mini_inputs: tuple[Any, Any, Any]) -> None:
    model, _, inputs = mini_inputs
    with pytest.raises(ValueError, match="at least one strategy"):
        compare(model, inputs, [])
    text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.warns(UserWarning, match="no image"), pytest.raises(ValueError, match="HiRED reduced no image"):
        compare(model, text, [HiRED()], max_new_tokens=1)


def test_account_is_displayed(mini_inputs: tuple[Any, Any, Any]) -> None:
    model, _, inputs = mini_inputs
    with HiRED(0.2)(model) as run:
        assert "no image was reduced" in run.account._repr_html_()
        model.generate(**inputs, max_new_tokens=1)
    html = run.account._repr_html_()
    assert f">{run.account.kept}<" in html
    assert f"{run.account.flops / run.account.flops_full:.1%}" in html
    assert " ".join(map(str, run.account.tokens_per_layer)) in html


def test_selection_is_displayed_with_and_without_pixels() -> None:
    geometry = TileGeometry.single((2, 2))
    plain = Selection.all_tokens(geometry)
    assert plain._repr_png_() is None
    assert "4 of 4 tokens kept" in plain._repr_html_()
    assert "<img" not in plain._repr_html_()
    drawn = Selection.all_tokens(geometry, torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    assert (drawn._repr_png_() or b"").startswith(b"\x89PNG")
    assert 'src="data:image/png;base64,' in drawn._repr_html_()


def test_encoded_image_lists_its_signals_without_computing_features() -> None:
    image = random_encoded_image(TileGeometry.single((4, 4)))

    def fail() -> torch.Tensor:
        raise AssertionError("features were computed")

    lazy = EncodedImage(image.geometry, signals=image.signals, compute_features=fail, device="cpu")
    html = lazy._repr_html_()
    assert html.count("<tr>") == 1 + len(image.signals)
    assert "4 x 4 tokens per tile" in html


def test_results_of_ablations_are_displayed() -> None:
    records = [{"sample": n, "group": n, "score": float(n < 3), "correct": n < 3, "error": None} for n in range(4)]
    setting = Setting("a1", "HiRED", "HiRED", 0.2, records=records)
    html = Results("study", [setting], ["<incomplete>"])._repr_html_()
    assert ">75.0%<" in html
    assert ">20%<" in html
    assert "&lt;incomplete&gt;" in html


def test_tables_escape_their_texts() -> None:
    assert "<b>" not in format_table(["<b>"], [["<b>"]], "<b>")
