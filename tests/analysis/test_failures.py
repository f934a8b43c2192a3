"""Samples on which two settings differ, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.records import board_records, record, setting, write_setting
from tests.helpers.reports import parse_table
from tokenprune import Selection, TileGeometry
from tokenprune.experiments.analysis.report import write_report
from tokenprune.experiments.analysis.report.failures import choose_pair
from tokenprune.experiments.evaluation.stored_images import selection_to_record, store_image


def make_record_with_image(
    board: int, question: int, score: float, tokens: Sequence[int], **fields: Any
) -> dict[str, Any]:
    """Return a record with the kept tokens of two tiles of 2 x 2 tokens."""
    kept = torch.zeros(2, 4, dtype=torch.bool)
    kept.view(-1)[list(tokens)] = True
    geometry = TileGeometry.anyres((40, 40), (1, 1), (2, 2), 40)
    selection = selection_to_record(Selection(geometry, kept, len(tokens)))
    return record(board, question, score, **fields) | {"stored_image": f"images/{board}.png", "selection": selection}


def write_failing_pair(directory: Path) -> Path:
    """Write an ablation with images in which HiRED and SCOPE each fail on a sample that the other strategy answers."""
    outcomes = {"HiRED": [1, 1, 0, 1, 0], "SCOPE": [0, 1, 1, 1, 0], "UniformStride": [1, 0, 0, 0, 0]}
    write_setting(
        directory, [record(board, 0, score) for board, score in enumerate([1, 1, 1, 1, 0])], role="full", budget=1.0
    )
    for number, (name, scores) in enumerate(outcomes.items()):
        role = "baseline" if name == "UniformStride" else "grid"
        for budget in (0.2, 0.05):
            rows = [make_record_with_image(board, 0, score, [number, 4 + number]) for board, score in enumerate(scores)]
            write_setting(directory, rows, name, budget, role)
    for board in range(5):
        pixels = torch.arange(2 * 40 * 40 * 3).view(2, 40, 40, 3).remainder(251).to(torch.uint8)
        assert store_image(directory, f"images/{board}", pixels) == f"images/{board}.png"
    return directory


def test_failures_are_shown_side_by_side_with_kept_tokens(tmp_path: Path) -> None:
    paths = write_report(write_failing_pair(tmp_path))
    text = (tmp_path / "report.md").read_text()
    part = text.split("## Failures side by side")[1]
    assert "**HiRED at 5%** and **SCOPE at 5%**, the best two at the smallest budget: of 5 samples" in part
    assert "only the first has 1 right, only the second 1" in part
    assert part.count("### What number is on the red star?") == 2
    head, images, captions = parse_table(text, "Failures side by side")
    assert head == ["the image", "HiRED", "SCOPE"]
    assert captions[1:] == ["right: `36`; 40 tokens kept", "**wrong**: `17`; 40 tokens kept"]
    files = [path for path in paths if path.name.startswith("failure-")]
    assert [f"![{name}](figures/{file.name})" for name, file in zip(head, files[:3], strict=True)] == images
    kept_masks = [(np.asarray(Image.open(file)) == [0xD5, 0x5E, 0x00]).all(axis=-1) for file in files[1:3]]
    assert all(mask.any() for mask in kept_masks)
    assert (kept_masks[0] != kept_masks[1]).any()  # the settings keep different tokens
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + 3 * 2


def test_any_two_settings_can_be_compared(tmp_path: Path) -> None:
    write_failing_pair(tmp_path)
    write_report(tmp_path, compare=["HiRED, budget=0.2", "000000000005"])
    text = (tmp_path / "report.md").read_text()
    assert "**HiRED at 20%** and **UniformStride at 20%**, as requested" in text
    write_report(tmp_path, compare=["HiRED, budget=0.2", "SCOPE, budget=0.05"])
    assert len(list((tmp_path / "figures").glob("failure-*.png"))) == 6  # older figures are deleted
    with pytest.raises(ValueError, match=r"no setting is called 'SCOPE, budget=0.5'. Did you mean 'SCOPE, budget=0."):
        write_report(tmp_path, compare=["HiRED, budget=0.2", "SCOPE, budget=0.5"])
    with pytest.raises(ValueError, match="are the same setting"):
        write_report(tmp_path, compare=["HiRED, budget=0.2", "HiRED, budget=0.2"])


def test_failures_without_images_are_shown_as_text(tmp_path: Path, report_folder: Path) -> None:
    part = (report_folder / "report.md").read_text().split("## Failures side by side")[1]
    assert "Their records hold no kept tokens, so only texts are shown." in part
    assert "Expected: `36`. Full tokens: `36`." in part
    assert "**wrong**: `17`" in part
    assert "failure-" not in part
    write_failing_pair(tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    write_report(tmp_path)
    assert "not in the folder `images`" in (tmp_path / "report.md").read_text()


def test_a_pair_skips_settings_with_equal_answers() -> None:
    equal_settings = [setting(board_records([[1], [1], [0]]), hash=str(number), role="grid") for number in range(2)]
    different_setting = setting(board_records([[0], [1], [1]]), hash="2", role="grid")
    pair = choose_pair([*equal_settings, different_setting])
    assert pair is not None
    assert [candidate.hash for candidate in pair[:2]] == ["0", "2"]
    assert pair[2].endswith("(1 between them answers like the best)")
    assert choose_pair([different_setting]) is None
