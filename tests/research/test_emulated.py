"""What released code does around a strategy: each emulation on small layouts, and one run on the embedded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from research import emulated
from research.emulated import EncodedBoard
from research.mini_training.evaluate import build_inputs
from tests.helpers.build import best_grid
from tokenprune.image import NEWLINE, TileGeometry
from tokenprune.models import mini
from tokenprune.models.mini.boards import GRIDS, TILE, make_board
from tokenprune.strategies import HiRED, HoloV, PruMerge
from tokenprune.strategies.trim import OutlierAllocation
from tokenprune.testing.encoded_images import random_encoded_image

NARROW = TileGeometry.anyres((8, 12), (1, 2), (4, 4), 8)
"""Two tiles side by side on a canvas of 4 x 8 tokens, of which one column is padding at each side."""


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shown(model: Any) -> EncodedBoard:
    processor = AutoProcessor.from_pretrained(mini.path())
    first, second = (make_board(index, "heldout", grid=(1, 2)) for index in (1000, 1001))
    encodings = [emulated.encode_board(model, processor, board) for board in (first, second)]
    return EncodedBoard(model, processor, second, encodings[1], encodings[:1])


def test_misplaced_tokens_fill_their_tile_from_its_first_row_on() -> None:
    """Three valid columns a tile: the fourth token of a tile, which begins its second row, ends up in the first."""
    assert NARROW.packed[16:23].tolist() == [17, 18, 19, 32, 33, 34, NEWLINE]
    packed = emulated.pack_at_valid_index(NARROW, (8, 12))
    assert packed[:16].tolist() == list(range(16))
    assert packed[16:25].tolist() == [17, 18, 19, 21, 32, 33, 34, 36, NEWLINE]
    assert sorted(packed.tolist()) == sorted(NARROW.packed.tolist())


def test_misplaced_tokens_stand_where_they_belong_without_padding_and_newlines_of_padding_stay() -> None:
    full = TileGeometry.anyres((16, 16), (2, 2), (4, 4), 8)
    assert torch.equal(emulated.pack_at_valid_index(full, (16, 16)), full.packed)
    low = TileGeometry.anyres((12, 16), (2, 2), (4, 4), 8)
    packed = emulated.pack_at_valid_index(low, (12, 16))
    assert int((packed == NEWLINE).sum()) == 8
    assert low.newlines == 6


def test_exchanged_rows_and_columns_cut_valid_tokens_away() -> None:
    square = TileGeometry.anyres((160, 160), (2, 2), (4, 4), TILE)
    assert torch.equal(emulated.pack_with_swapped_grid(square, (160, 160)), square.packed)
    wide = TileGeometry.anyres((80, 160), (1, 2), (4, 4), TILE)
    packed = emulated.pack_with_swapped_grid(wide, (80, 160))
    assert packed[packed != NEWLINE].tolist() == [*range(16), *range(28, 36)]  # of an 8 x 4 canvas, two rows


def test_images_together_are_pruned_by_the_outliers_of_all() -> None:
    layout = TileGeometry.anyres((8, 12), (1, 2), (12, 12), 8)
    images = [random_encoded_image(layout, seed=seed) for seed in range(3)]
    batch = emulated.merge_images(images)
    assert batch.geometry.tiles == 9
    valid = torch.cat([image.geometry.valid for image in images])
    assert torch.equal(batch.geometry.valid, valid)
    alone = [PruMerge.release().reduce(image).kept for image in images]
    assert torch.equal(PruMerge.release().reduce(emulated.merge_images(images[:1])).kept, alone[0])
    assert not torch.equal(PruMerge.release().reduce(batch).kept, torch.cat(alone))


def test_a_share_of_outliers_counts_the_other_images() -> None:
    image, values = random_encoded_image(NARROW), torch.zeros(3, 16)
    values[:, 0] = 9.0  # one outlier in every tile
    assert OutlierAllocation(extra=0).allocate(image, 0, [16] * 3, values) == [1, 1, 1]
    with_many = emulated.BatchOutlierAllocation(extra=0, batch_scores=[0.5] * 12 + [1e-4] * 68)
    assert with_many.allocate(image, 0, [16] * 3, values) == [1, 1, 1]  # 15 of 128
    flat = emulated.BatchOutlierAllocation(extra=0, batch_scores=[1e-4] * 80)
    assert flat.allocate(image, 0, [16] * 3, values) == [0, 0, 0]  # 3 of 128


def test_the_second_image_reads_the_attention_of_the_first() -> None:
    first, second = random_encoded_image(NARROW, seed=0), random_encoded_image(NARROW, seed=1)
    read = emulated.shift_attention(first, second)
    both = torch.cat([first.cls_logits(-1), second.cls_logits(-1)])
    assert torch.equal(read.cls_logits(-1), both[1:4])
    assert torch.equal(read.features, second.features)
    same = emulated.share_attention(first, second)
    assert torch.equal(HiRED(5).reduce(same).kept, HiRED(5).reduce(first).kept)


@pytest.mark.parametrize("size", [(80, 160), (160, 130), (80, 222), (236, 80)])
def test_most_boards_get_the_same_grid_by_the_largest_used_share(size: tuple[int, int]) -> None:
    assert emulated.grid_by_used_share(size) == best_grid(size, TILE, list(GRIDS))


def test_the_largest_used_share_gives_a_long_strip_fewer_tiles() -> None:
    assert best_grid((80, 192), TILE, list(GRIDS)) == (1, 3)
    assert emulated.grid_by_used_share((80, 192)) == (1, 2)


def test_a_forced_grid_is_encoded_and_the_model_is_as_before(shown: EncodedBoard) -> None:
    before = shown.model.config.image_grid_pinpoints
    forced = emulated.change_grid(HiRED, emulated.two_by_two_grid)(shown, 0.1)
    assert forced.encoding.images[0].geometry.tile_grid == (2, 2)
    own = emulated.apply_strategy(HiRED)(shown, 0.1)
    assert len(own.tokens) == len(forced.tokens)
    assert own.tokens & forced.tokens  # of the base tile, which is the same
    assert all(token[0] is None for token in own.tokens & forced.tokens)  # type: ignore[index]
    assert shown.model.config.image_grid_pinpoints == before


def test_prompts_are_those_of_the_processor(shown: EncodedBoard) -> None:
    questions = [question.text for question in shown.board.questions]
    made = emulated.build_prompts(shown.processor, questions, [len(shown.encoding.packed[0])])
    wanted = build_inputs(shown.processor, shown.board.image, questions)
    assert all(torch.equal(made[name], wanted[name]) for name in made)
    two = emulated.build_prompts(shown.processor, ["What paper is this?"], [2, 3])["input_ids"][0]
    assert int((two == shown.model.config.image_token_id).sum()) == 5


def test_zero_vectors_fill_what_the_stripes_lose(shown: EncodedBoard) -> None:
    budget = 0.9
    lost = HoloV.release(budget).reduce(shown.encoding.images[0])
    assert lost.kept_tokens < lost.asked
    features = emulated.fill_with_zeros(shown, budget).encoding.packed[0]
    zero = (features == 0).all(dim=1)
    assert len(features) == lost.asked
    assert not bool(zero[: lost.kept_tokens].any())
    assert bool(zero[lost.kept_tokens :].all())


def test_features_of_a_batch_of_one_are_those_of_the_attached_strategy(shown: EncodedBoard) -> None:
    """PruMerge's merged features are made here and in `attach`; with nothing else in the batch they must agree."""
    alone = EncodedBoard(shown.model, shown.processor, shown.board, shown.encoding, [])
    features = emulated.prune_by_batch_outliers(alone, 1.0).encoding.packed[0]
    inputs = build_inputs(shown.processor, shown.board.image, [shown.board.questions[0].text])
    handed: list[Any] = []
    with PruMerge.release()(shown.model), torch.no_grad():
        hook = shown.model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: handed.append(kwargs["mm_encoder_outputs"]["image"].pooler_output[0]),
            with_kwargs=True,
        )
        shown.model(**inputs)
        hook.remove()
    torch.testing.assert_close(features, handed[0], atol=1e-4, rtol=1e-4)


def test_one_board_is_measured_with_every_emulation() -> None:
    known = [one for one in emulated.list_emulations() if one.source is emulated.all_boards]
    found = emulated.measure_emulations(known, 1001, 1, [0.1])
    assert len(found) == len(known)
    for (place, _), pairs in found.items():
        kept, moved, there = pairs.tokens[0]
        assert 0 <= moved <= kept, known[place].description
        assert len(pairs.reference[0]) == len(pairs.deviating[0])
        assert there > 0
    assert {known[place].method for place, _ in found} == {
        "HiRED", "GlobalCom2", "HoloV", "PruMerge", "VisPruner", "CDPruner", "FasterVLM", "TRIM",
    }  # fmt: skip
    same = [pairs for (place, _), pairs in found.items() if known[place].method == "FasterVLM"]
    assert same[0].tokens[0][1] == 0  # this board gets its own grid, so nothing moves
