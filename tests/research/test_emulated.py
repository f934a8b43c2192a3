"""Emulations of released code: each emulation on small layouts, and one run on the embedded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from research import emulated, emulators
from research.emulators import EncodedBoard
from research.mini_training.evaluate import build_inputs
from tests.helpers.build import best_grid
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.models import mini
from tokenprune.models.mini.boards import GRIDS, TILE, make_board
from tokenprune.strategies import HiRED, HoloV, PruMerge
from tokenprune.strategies.trim import OutlierAllocation
from tokenprune.testing.encoded_images import random_encoded_image

NARROW = TileGeometry.anyres((8, 12), (1, 2), (4, 4), 8)
"""Two tiles next to each other on a canvas of 4 x 8 tokens; one column at each side is padding."""


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoded(model: Any) -> EncodedBoard:
    processor = AutoProcessor.from_pretrained(mini.path())
    first, second = (make_board(index, "heldout", grid=(1, 2)) for index in (1000, 1001))
    encodings = [emulators.encode_board(model, processor, board) for board in (first, second)]
    return EncodedBoard(model, processor, second, encodings[1], encodings[:1])


def test_misplaced_tokens_fill_their_tile_from_its_first_row() -> None:
    """With three valid columns per tile, the fourth token of a tile moves from its second row to its first row."""
    assert NARROW.packed[16:23].tolist() == [17, 18, 19, 32, 33, 34, NEWLINE]
    packed = emulators.pack_at_valid_index(NARROW, (8, 12))
    assert packed[:16].tolist() == list(range(16))
    assert packed[16:25].tolist() == [17, 18, 19, 21, 32, 33, 34, 36, NEWLINE]
    assert sorted(packed.tolist()) == sorted(NARROW.packed.tolist())


def test_misplaced_tokens_without_padding_columns_are_in_place() -> None:
    full = TileGeometry.anyres((16, 16), (2, 2), (4, 4), 8)
    assert torch.equal(emulators.pack_at_valid_index(full, (16, 16)), full.packed)
    padded_rows = TileGeometry.anyres((12, 16), (2, 2), (4, 4), 8)
    packed = emulators.pack_at_valid_index(padded_rows, (12, 16))
    assert int((packed == NEWLINE).sum()) == 8
    assert padded_rows.newlines == 6


def test_swapped_rows_and_columns_remove_valid_tokens() -> None:
    square = TileGeometry.anyres((160, 160), (2, 2), (4, 4), TILE)
    assert torch.equal(emulators.pack_with_swapped_grid(square, (160, 160)), square.packed)
    wide = TileGeometry.anyres((80, 160), (1, 2), (4, 4), TILE)
    packed = emulators.pack_with_swapped_grid(wide, (80, 160))
    assert packed[packed != NEWLINE].tolist() == [*range(16), *range(28, 36)]  # two rows of a canvas of 8 x 4 tokens


def test_images_of_a_batch_are_pruned_by_common_outliers() -> None:
    layout = TileGeometry.anyres((8, 12), (1, 2), (12, 12), 8)
    images = [random_encoded_image(layout, seed=seed) for seed in range(3)]
    batch = emulators.merge_images(images)
    assert batch.geometry.tiles == 9
    valid = torch.cat([image.geometry.valid for image in images])
    assert torch.equal(batch.geometry.valid, valid)
    separate = [PruMerge.release().reduce(image).kept for image in images]
    assert torch.equal(PruMerge.release().reduce(emulators.merge_images(images[:1])).kept, separate[0])
    assert not torch.equal(PruMerge.release().reduce(batch).kept, torch.cat(separate))


def test_the_share_of_outliers_includes_the_images_of_the_batch() -> None:
    image, values = random_encoded_image(NARROW), torch.zeros(3, 16)
    values[:, 0] = 9.0  # one outlier in every tile
    assert OutlierAllocation(extra=0).allocate(image, 0, [16] * 3, values) == [1, 1, 1]
    many_outliers = emulators.BatchOutlierAllocation(extra=0, batch_scores=[0.5] * 12 + [1e-4] * 68)
    assert many_outliers.allocate(image, 0, [16] * 3, values) == [1, 1, 1]  # 15 of 128
    few_outliers = emulators.BatchOutlierAllocation(extra=0, batch_scores=[1e-4] * 80)
    assert few_outliers.allocate(image, 0, [16] * 3, values) == [0, 0, 0]  # 3 of 128


def test_the_second_image_reads_the_attention_of_the_first() -> None:
    first, second = random_encoded_image(NARROW, seed=0), random_encoded_image(NARROW, seed=1)
    shifted = emulators.shift_attention(first, second)
    batch_logits = torch.cat([first.cls_logits(-1), second.cls_logits(-1)])
    assert torch.equal(shifted.cls_logits(-1), batch_logits[1:4])
    assert torch.equal(shifted.features, second.features)
    shared = emulators.share_attention(first, second)
    assert torch.equal(HiRED(5).reduce(shared).kept, HiRED(5).reduce(first).kept)


@pytest.mark.parametrize("size", [(80, 160), (160, 130), (80, 222), (236, 80)])
def test_most_boards_get_the_same_grid_by_the_largest_used_share(size: tuple[int, int]) -> None:
    assert emulators.grid_by_used_share(size) == best_grid(size, TILE, list(GRIDS))


def test_the_largest_used_share_gives_a_long_strip_fewer_tiles() -> None:
    assert best_grid((80, 192), TILE, list(GRIDS)) == (1, 3)
    assert emulators.grid_by_used_share((80, 192)) == (1, 2)


def test_a_forced_grid_is_encoded_and_the_model_is_restored(encoded: EncodedBoard) -> None:
    before = encoded.model.config.image_grid_pinpoints
    forced = emulators.change_grid(HiRED, emulators.two_by_two_grid)(encoded, 0.1)
    assert forced.encoding.images[0].geometry.tile_grid == (2, 2)
    default = emulators.apply_strategy(HiRED)(encoded, 0.1)
    assert len(default.tokens) == len(forced.tokens)
    assert default.tokens & forced.tokens  # tokens of the base tile, which does not depend on the grid
    assert all(token[0] is None for token in default.tokens & forced.tokens)  # type: ignore[index]
    assert encoded.model.config.image_grid_pinpoints == before


def test_prompts_equal_the_prompts_of_the_processor(encoded: EncodedBoard) -> None:
    questions = [question.text for question in encoded.board.questions]
    prompts = emulated.build_prompts(encoded.processor, questions, [len(encoded.encoding.packed[0])])
    expected = build_inputs(encoded.processor, encoded.board.image, questions)
    assert all(torch.equal(prompts[name], expected[name]) for name in prompts)
    two_images = emulated.build_prompts(encoded.processor, ["What paper is this?"], [2, 3])["input_ids"][0]
    assert int((two_images == encoded.model.config.image_token_id).sum()) == 5


def test_zero_vectors_replace_tokens_that_stripes_lose(encoded: EncodedBoard) -> None:
    budget = 0.9
    selection = HoloV.release(budget).reduce(encoded.encoding.images[0])
    assert selection.kept_tokens < selection.asked
    features = emulators.fill_with_zeros(encoded, budget).encoding.packed[0]
    zero = (features == 0).all(dim=1)
    assert len(features) == selection.asked
    assert not bool(zero[: selection.kept_tokens].any())
    assert bool(zero[selection.kept_tokens :].all())


def test_a_batch_of_one_has_the_features_of_the_attached_strategy(encoded: EncodedBoard) -> None:
    """In a batch of one image, the emulation gives the merged features of the attached PruMerge."""
    single = EncodedBoard(encoded.model, encoded.processor, encoded.board, encoded.encoding, [])
    features = emulators.prune_by_batch_outliers(single, 1.0).encoding.packed[0]
    inputs = build_inputs(encoded.processor, encoded.board.image, [encoded.board.questions[0].text])
    captured: list[Any] = []
    with PruMerge.release()(encoded.model), torch.no_grad():
        hook = encoded.model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: captured.append(kwargs["mm_encoder_outputs"]["image"].pooler_output[0]),
            with_kwargs=True,
        )
        encoded.model(**inputs)
        hook.remove()
    torch.testing.assert_close(features, captured[0], atol=1e-4, rtol=1e-4)


def test_every_emulation_is_measured_on_a_board() -> None:
    emulations = [emulation for emulation in emulated.list_emulations() if emulation.source is emulators.all_boards]
    measured = emulated.measure_emulations(emulations, 1001, 1, [0.1])
    assert len(measured) == len(emulations)
    for (index, _), pairs in measured.items():
        kept, moved, n_deviating = pairs.tokens[0]
        assert 0 <= moved <= kept, emulations[index].description
        assert len(pairs.reference[0]) == len(pairs.deviating[0])
        assert n_deviating > 0
    assert {emulations[index].method for index, _ in measured} == {
        "HiRED", "GlobalCom2", "HoloV", "PruMerge", "VisPruner", "CDPruner", "FasterVLM", "TRIM",
    }  # fmt: skip
    fastervlm = [pairs for (index, _), pairs in measured.items() if emulations[index].method == "FasterVLM"]
    assert fastervlm[0].tokens[0][1] == 0  # both grids are equal for this board, so no token moves
