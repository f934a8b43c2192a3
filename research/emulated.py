"""Emulates deviations of released code outside the strategy on held-out boards: batches, layouts, tile grids, prompts.

Run it: ``python -m research.emulated``

A strategy reads one image and returns a selection. Some releases also read further images of a batch, put tokens at
wrong positions, feed zero vectors, or replace the processor's tile grid. A strategy cannot do this. This module changes
the encoding of a board as the released code does, and measures the answers of the LLM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from research.emulators import (
    BATCH,
    Emulator,
    EncodedBoard,
    LlmInput,
    adaptive_trim,
    all_boards,
    apply_strategy,
    boards_with_changed_grid,
    boards_with_side_padding,
    change_grid,
    encode_board,
    fill_with_zeros,
    grid_by_used_share,
    keep_base_tile,
    pack_at_valid_index,
    pack_with_swapped_grid,
    prune_by_batch_outliers,
    prune_by_batch_relevance,
    repack,
    share_attention,
    shift_attention,
    two_by_two_grid,
    use_second_image,
)
from research.heldout import (
    Answers,
    StudyOptions,
    answer_from_encoding,
    board_interval,
    format_difference,
    make_text_guided,
)
from tokenprune.models import mini
from tokenprune.models.mini.boards import Board, boards
from tokenprune.reducer import TokenReducer
from tokenprune.strategies import FasterVLM, GlobalCom2, HiRED, HoloV, PruMerge, VisPruner
from tokenprune.strategies.trim import OutlierAllocation


@dataclass(frozen=True, eq=False)
class Emulation:
    """One deviation of released code outside the strategy.

    Args:
        method: name of the method.
        description: short text of the deviation.
        reference: emulator without the deviation.
        deviating: emulator of the released code.
        source: returns the boards of the measurement from the index of the first board.
        has_budget: whether the emulators use the budget.
    """

    method: str
    description: str
    reference: Emulator
    deviating: Emulator
    source: Callable[[int], Iterator[Board]] = all_boards
    has_budget: bool = True


def list_emulations() -> list[Emulation]:
    """Return all emulated deviations, grouped by method."""

    def cdpruner(budget: float | int) -> TokenReducer:
        return replace(make_text_guided()[0], budget=budget)

    hired, globalcom2, faster = apply_strategy(HiRED), apply_strategy(GlobalCom2), apply_strategy(FasterVLM)
    cut_off = repack(lambda budget: HiRED(budget, padding="ignore"), pack_with_swapped_grid)
    grids = [("VisPruner", apply_strategy(VisPruner), VisPruner), ("CDPruner", apply_strategy(cdpruner), cdpruner)]
    misplaced = repack(GlobalCom2, pack_at_valid_index)
    return [
        Emulation("HiRED", "rows and columns of the tile grid exchanged", hired, cut_off),
        Emulation("HiRED", "the release with that exchange", hired, repack(HiRED.release, pack_with_swapped_grid)),
        Emulation(
            "HiRED",
            "base tile only, mask of the first image of a batch",
            use_second_image(HiRED, separate_prompts=True, preprocess=keep_base_tile),
            use_second_image(HiRED, share_attention, separate_prompts=True, preprocess=keep_base_tile),
        ),
        Emulation(
            "HiRED",
            "base tile only, mask of the first image of a prompt",
            use_second_image(HiRED, preprocess=keep_base_tile),
            use_second_image(HiRED, share_attention, preprocess=keep_base_tile),
        ),
        Emulation("GlobalCom2", "tokens at their number inside the unpadded tile", globalcom2, misplaced),
        Emulation(
            "GlobalCom2",
            "tokens at their number, boards padded at the sides only",
            globalcom2,
            misplaced,
            boards_with_side_padding,
        ),
        Emulation(
            "GlobalCom2",
            "second image of a batch by the attention of the first",
            globalcom2,
            use_second_image(GlobalCom2, shift_attention, separate_prompts=True),
        ),
        Emulation(
            "GlobalCom2",
            "second image of a prompt by the attention of the first",
            use_second_image(GlobalCom2),
            use_second_image(GlobalCom2, shift_attention),
        ),
        Emulation("HoloV", "zero vectors instead of missing tokens", apply_strategy(HoloV.release), fill_with_zeros),
        Emulation(
            "PruMerge",
            "outliers counted over a batch of 8",
            apply_strategy(lambda _: PruMerge.release()),
            prune_by_batch_outliers,
            has_budget=False,
        ),
        Emulation(
            "TRIM",
            "outliers counted over a batch of 8",
            apply_strategy(lambda _: adaptive_trim(OutlierAllocation())),
            prune_by_batch_relevance,
            has_budget=False,
        ),
        *(
            Emulation(name, description, reference, change_grid(make, two_by_two_grid, keeps_count))
            for name, reference, make in grids
            for description, keeps_count in (
                ("2 x 2 tiles, as many tokens", True),
                ("2 x 2 tiles, the same share", False),
            )
        ),
        Emulation(
            "FasterVLM", "tile grid by the largest used share", faster, change_grid(FasterVLM, grid_by_used_share)
        ),
        Emulation(
            "FasterVLM",
            "that grid, boards where it is another one only",
            faster,
            change_grid(FasterVLM, grid_by_used_share),
            boards_with_changed_grid,
        ),
    ]


def build_prompts(processor: Any, questions: Sequence[str], lengths: Sequence[int]) -> dict[str, Tensor]:
    """Return the text inputs of one prompt per question, each with the same images.

    Args:
        processor: the processor.
        questions: the questions.
        lengths: number of tokens of each image.
    """
    texts, image = [], processor.image_token
    for question in questions:
        content = [{"type": "image"} for _ in lengths] + [{"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        head, *parts = text.split(image)
        texts.append(head + "".join(image * n + part for n, part in zip(lengths, parts, strict=True)))
    inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@dataclass
class PairedAnswers:
    """Answers and token counts of one emulation at one budget, board by board.

    Args:
        reference: right (1) or wrong (0) per question, without the deviation.
        deviating: right (1) or wrong (0) per question, with the deviation.
        tokens: number of tokens without the deviation, how many of them the deviation removes, and number of tokens
            with the deviation.
    """

    reference: list[Answers] = field(default_factory=list)
    deviating: list[Answers] = field(default_factory=list)
    tokens: list[tuple[int, int, int]] = field(default_factory=list)

    def row(self) -> str:
        """Return table cells: questions, tokens moved, budget lost, reference accuracy and difference in points."""
        kept, moved, n_deviating = np.array(self.tokens).sum(axis=0)
        points = format_difference([a - b for a, b in zip(self.deviating, self.reference, strict=True)])
        accuracy, questions = 100 * board_interval(self.reference)[0], sum(map(len, self.reference))
        return f"{questions:,} | {moved / kept:.1%} | {(kept - n_deviating) / kept:.1%} | {accuracy:.1f} | {points}"


def measure_emulations(
    emulations: Sequence[Emulation], first: int, number: int, budgets: Sequence[float]
) -> dict[tuple[int, float], PairedAnswers]:
    """Measure emulations on held-out boards.

    Args:
        emulations: the emulations.
        first: index of the first board; the boards before it fill the first batches.
        number: number of boards.
        budgets: budgets as ratios; emulations without a budget are measured once.

    Returns:
        The answers and token counts, by index of the emulation and budget.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(mini.path())
    results: dict[tuple[int, float], PairedAnswers] = {}
    for source in dict.fromkeys(emulation.source for emulation in emulations):
        batch = [encode_board(model, processor, board) for board in boards(BATCH - 1, "heldout", first - BATCH + 1)]
        earlier = deque(batch, maxlen=BATCH - 1)
        for board in islice(source(first), number):
            encoded = EncodedBoard(model, processor, board, encode_board(model, processor, board), list(earlier))
            answers: dict[tuple[Emulator, float], tuple[LlmInput, Answers]] = {}
            for index, emulation in enumerate(emulations):
                for budget in budgets[: None if emulation.has_budget else 1] if emulation.source is source else ():
                    for emulator in (emulation.reference, emulation.deviating):
                        if (emulator, budget) not in answers:
                            answers[emulator, budget] = _answer_questions(encoded, emulator, budget)
                    reference, reference_right = answers[emulation.reference, budget]
                    deviating, deviating_right = answers[emulation.deviating, budget]
                    pairs = results.setdefault((index, budget), PairedAnswers())
                    pairs.reference.append(reference_right)
                    pairs.deviating.append(deviating_right)
                    moved = reference.tokens - deviating.tokens
                    pairs.tokens.append((len(reference.tokens), len(moved), len(deviating.tokens)))
            earlier.append(encoded.encoding)
    return results


def _answer_questions(encoded: EncodedBoard, emulator: Emulator, budget: float) -> tuple[LlmInput, Answers]:
    """Return the input of the LLM, and for each question 1 if the answer is correct and 0 if not."""
    questions = encoded.board.questions
    with torch.no_grad():
        llm_input = emulator(encoded, budget)
        lengths = [len(features) for features in llm_input.encoding.packed]
        inputs = build_prompts(encoded.processor, [question.text for question in questions], lengths)
        texts, _ = answer_from_encoding(encoded.model, encoded.processor, llm_input.encoding, inputs, llm_input.reducer)
    right = ["".join(text.split()) == question.answer for text, question in zip(texts, questions, strict=True)]
    return llm_input, np.array(right, dtype=np.int64)


def main(options: StudyOptions) -> None:
    """Measure the emulations and print one table per method."""
    emulations = [
        emulation for emulation in list_emulations() if options.methods is None or emulation.method in options.methods
    ]
    results = measure_emulations(emulations, options.first, options.number, options.budgets)
    for method in dict.fromkeys(emulation.method for emulation in emulations):
        print(f"\n{method}, {options.number} boards\n")
        print("| deviation | budget | questions | tokens moved | budget lost | compared with, % | difference, points |")
        print("|---|---|---|---|---|---|---|")
        for (index, budget), pairs in results.items():
            emulation = emulations[index]
            if emulation.method == method:
                share = f"{budget:.0%}" if emulation.has_budget else "its own"
                print(f"| {emulation.description} | {share} | {pairs.row()} |", flush=True)


if __name__ == "__main__":
    import jsonargparse

    main(jsonargparse.auto_cli(StudyOptions, as_positional=False))
