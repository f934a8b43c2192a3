"""What released code does around a strategy, emulated on held-out boards: batches, layouts, tile grids, prompts.

Run it: ``python -m research.emulated``

A strategy sees one image and answers with a selection, so it cannot do what some releases do: look at other images
of a batch, put tokens at wrong places, feed zero vectors, or replace the processor's tile grid. Here the encoding of a
board is changed as that code changes it, and the questions are answered from what then enters the LLM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from research.heldout import Answers, answer, in_points, interval, text_guided
from tokenprune.adapter import Encoding, PackedTokens, find_adapter
from tokenprune.budget import as_budget
from tokenprune.image import NEWLINE, TEXT_SIGNALS, EncodedImage, Signal, TileGeometry
from tokenprune.models import mini
from tokenprune.models.mini.boards import TILE, Board, boards, make_board
from tokenprune.reducer import TokenReducer
from tokenprune.selection import Selection
from tokenprune.stages import mix, projector_sources
from tokenprune.strategies import TRIM, FasterVLM, GlobalCom2, HiRED, HoloV, PruMerge, UniformStride, VisPruner
from tokenprune.strategies.trim import OutlierAllocation, outlier_share

BATCH = 8
"""Images of a batch."""
Grid: TypeAlias = tuple[int, int]


class Fed(NamedTuple):
    """What enters the LLM: the images of a prompt, and a strategy for them.

    Args:
        encoding: the images of one prompt; the questions are about the last one.
        reducer: the strategy.
        tokens: what stays of the last image; a token in another row or tile grid is another one.
    """

    encoding: Encoding
    reducer: TokenReducer
    tokens: frozenset[Hashable]


@dataclass(frozen=True, eq=False)
class Shown:
    """A board before the model, as the last of a batch.

    Args:
        model: the model.
        processor: its processor.
        board: the board.
        encoding: the board, encoded.
        earlier: the boards before it, encoded, the latest last.
    """

    model: Any
    processor: Any
    board: Board
    encoding: Encoding
    earlier: Sequence[Encoding]

    def asked(self, image: EncodedImage) -> EncodedImage:
        """Return an image with the first question of the board."""
        asked = find_adapter(self.model).embed_question(self.board.questions[0].text, "mini")
        text = {(kind, image.feature_layer): asked[kind] for kind in TEXT_SIGNALS}
        return replace(image, signals={**image.signals, **text})

    def fed(self, encoding: Encoding, reducer: TokenReducer) -> Fed:
        """Return what a strategy leaves of an encoding. Strategies that read a question count for the first one."""
        image = encoding.images[-1]
        kept = reducer.reduce(self.asked(image)).kept.flatten()
        layout = image.geometry
        rows = torch.cumsum(layout.packed == NEWLINE, dim=0).tolist()
        places = zip(layout.packed.tolist(), rows, strict=True)
        grid = {place: layout.tile_grid if place >= layout.tokens else None for place in range(len(kept))}
        return Fed(encoding, reducer, frozenset((grid[p], p, r) for p, r in places if p != NEWLINE and bool(kept[p])))


Way: TypeAlias = Callable[[Shown, float], Fed]
"""From a board and a budget to what enters the LLM."""


# --- ways -------------------------------------------------------------------------------------------------------------


def plain(make: Callable[[float], TokenReducer]) -> Way:
    """Return the way of a strategy as it is.

    Args:
        make: the strategy at a budget.
    """
    return lambda shown, budget: shown.fed(shown.encoding, make(budget))


def relaid(make: Callable[[float], TokenReducer], layout: Callable[[TileGeometry, Grid], Tensor]) -> Way:
    """Return the way of a strategy whose tokens are packed otherwise.

    Args:
        make: the strategy at a budget; it sees which tokens the other packing cuts off.
        layout: `TileGeometry.packed` from the true layout and the height x width of the image in pixels.
    """

    def way(shown: Shown, budget: float) -> Fed:
        image = shown.encoding.images[0]
        size = (shown.board.pixels.shape[0], shown.board.pixels.shape[1])
        places = layout(image.geometry, size)
        assert image.newline is not None
        table = torch.cat([image.features.flatten(0, 1), image.newline[None]])
        image = replace(image, geometry=replace(image.geometry, packed=places))
        tokens = PackedTokens([table[places]])
        return shown.fed(replace(shown.encoding, images=[image], complete=False, tokens=tokens), make(budget))

    return way


def exchanged(layout: TileGeometry, size: Grid, tile_size: int = TILE) -> Tensor:
    """Return how HiRED's fork of LLaVA-NeXT packs tiles: rows and columns of their grid exchanged, then unpadded.

    Args:
        layout: the true layout.
        size: height x width of the image in pixels.
        tile_size: side of a tile in pixels.
    """
    rows, cols = layout.tile_grid
    return TileGeometry.anyres(size, (cols, rows), layout.token_grid, tile_size).packed


def misplaced(layout: TileGeometry, size: Grid) -> Tensor:
    """Return how GlobalCom2 packs tokens: at their number inside the unpadded tile; newlines of padding rows stay.

    Args:
        layout: the true layout.
        size: not used, the true layout knows.
    """
    nothing = NEWLINE - 1
    tiles = torch.full((layout.sub_images, layout.tokens), nothing)
    for tile, valid in enumerate(layout.valid[1:]):
        inside = valid.nonzero()[:, 0]
        tiles[tile, : len(inside)] = (1 + tile) * layout.tokens + inside
    (rows, cols), (height, width) = layout.tile_grid, layout.token_grid
    to_canvas = "(rows cols) (height width) -> (rows height) (cols width)"
    canvas = rearrange(tiles, to_canvas, rows=rows, cols=cols, height=height, width=width)
    canvas = torch.cat([canvas, torch.full((len(canvas), 1), NEWLINE)], dim=1).flatten()
    return torch.cat([torch.arange(layout.tokens), canvas[canvas != nothing]])


def zero_filled(shown: Shown, budget: float) -> Fed:
    """Feed what HoloV's release feeds: zero vectors at the end for what its stripes cannot hold."""
    reducer, image = HoloV.release(budget), shown.encoding.images[0]
    selection = reducer.reduce(image)
    assert selection.order is not None
    features = shown.encoding.packed[0][selection.packed_mask()][selection.order]
    missing = selection.asked - selection.kept_tokens
    tokens = shown.fed(shown.encoding, reducer).tokens | {("zero", number) for number in range(missing)}
    features = torch.cat([features, features.new_zeros(missing, features.shape[1])])
    return Fed(*as_it_is(shown.encoding, features), tokens)


def as_it_is(encoding: Encoding, features: Tensor) -> tuple[Encoding, TokenReducer]:
    """Return an encoding that is these features, `[length, dim]`, and a strategy that leaves it alone."""
    image = EncodedImage(TileGeometry.single((1, len(features))), features[None])
    return replace(encoding, images=[image], complete=False, tokens=PackedTokens([features])), UniformStride(1.0)


def together(images: Sequence[EncodedImage]) -> EncodedImage:
    """Return the tiles of several images as if they were those of one, without newlines.

    Args:
        images: encoded images of one model.
    """
    layouts = [image.geometry for image in images]
    starts = np.cumsum([0, *(layout.tiles * layout.tokens for layout in layouts)])
    packed = [p[p != NEWLINE] + int(s) for p, s in zip([one.packed for one in layouts], starts, strict=False)]
    tiles = sum(layout.tiles for layout in layouts)
    geometry = TileGeometry((tiles - 1, 1), layouts[0].token_grid, torch.zeros(tiles - 1, 4), torch.cat(packed))
    signals = {key: torch.cat([image.signals[key] for image in images]) for key in images[0].signals}
    features = torch.cat([image.features for image in images])
    return replace(images[0].with_features(features), geometry=geometry, signals=signals)


def outliers_of_a_batch(shown: Shown, budget: float) -> Fed:
    """Feed what PruMerge's release leaves of the last image of a batch: outliers are counted over all of them."""
    images = [one.images[0] for one in (*shown.earlier[1 - BATCH :], shown.encoding)]
    batch, own = together(images), images[-1].geometry
    selection: Selection = PruMerge.release().reduce(batch)
    first = batch.geometry.tiles - own.tiles
    assert selection.mixing is not None
    assert selection.order is not None
    mixed = mix(selection.mixing, projector_sources(batch, selection.mixing.shape[1]))[selection.order]
    features = find_adapter(shown.model).project(mixed[int(selection.kept[:first].sum()) :])
    kept = selection.kept[first:].flatten()
    everything = shown.fed(shown.encoding, UniformStride(1.0)).tokens
    tokens = frozenset(token for token in everything if bool(kept[token[1]]))  # type: ignore[index]
    return Fed(*as_it_is(shown.encoding, features), tokens)


@dataclass
class OutliersOfBatch(OutlierAllocation):
    """TRIM's adaptive share as in a batch: outliers are counted over all of it.

    Args:
        others: softmaxed scores of the other images, one list.
    """

    others: list[float] = field(default_factory=list)

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Return the number of outliers per tile."""
        share = outlier_share(torch.cat([scores.softmax(dim=1).flatten(), scores.new_tensor(self.others)]))
        return [min(int(scores.shape[1] * share) + self.extra, room) for room in capacity]


def adaptive(allocation: OutlierAllocation) -> TRIM:
    """Return the repaired TRIM with a share that is found from outliers."""
    return replace(text_guided()[2], budget=1.0, allocation=allocation)


def relevance_outliers_of_a_batch(shown: Shown, budget: float) -> Fed:
    """Feed what TRIM's adaptive share leaves of the last image of a batch whose images are all asked one thing."""
    score, others = adaptive(OutlierAllocation()).selection.score, []
    for encoding in shown.earlier[1 - BATCH :]:
        scores = score(shown.asked(encoding.images[0]))
        scores = scores.masked_fill(~encoding.images[0].geometry.valid, -torch.inf)
        others += scores.softmax(dim=1).flatten().tolist()
    return shown.fed(shown.encoding, adaptive(OutliersOfBatch(others=others)))


def base_tile(encoding: Encoding) -> Encoding:
    """Return an image as LLaVA-1.5 has it: nothing but the base tile."""
    image = encoding.images[0]
    layout = TileGeometry.single(image.geometry.token_grid)
    signals = {key: value[:1] for key, value in image.signals.items()}
    image = replace(image.with_features(image.features[:1]), geometry=layout, signals=signals)
    return replace(encoding, images=[image], complete=False, tokens=PackedTokens([image.features[0]]))


def shared_mask(first: EncodedImage, second: EncodedImage) -> EncodedImage:
    """Return the second image with the attention of the first, as HiRED on LLaVA-1.5 ranks it."""
    return replace(second, signals=first.signals)


def shifted_attention(first: EncodedImage, second: EncodedImage) -> EncodedImage:
    """Return the second image with the attention that GlobalCom2 reads for it: one tile after the first one's start.

    Its base tile is ranked by the first image's first sub-image, and so on through the tiles of both.
    """
    tiles = second.geometry.tiles
    both = {key: torch.cat([first.signals[key], value])[1 : 1 + tiles] for key, value in second.signals.items()}
    return replace(second, signals=both)


def second_image(
    make: Callable[[float], TokenReducer],
    read: Callable[[EncodedImage, EncodedImage], EncodedImage] = lambda first, second: second,
    alone: bool = False,
    part: Callable[[Encoding], Encoding] = lambda encoding: encoding,
) -> Way:
    """Return the way of a strategy with the second of two images.

    Args:
        make: the strategy at a budget.
        read: the second image as the code reads it, from the first and the second.
        alone: whether the second image stands in a prompt of its own, beside another prompt in a batch.
        part: what the model has of each image.
    """

    def way(shown: Shown, budget: float) -> Fed:
        one, two = part(shown.earlier[-1]), part(shown.encoding)
        other = read(one.images[0], two.images[0])
        if alone:
            return shown.fed(replace(two, images=[other]), make(budget))
        tokens = PackedTokens([one.packed[0], two.packed[0]])
        both = Encoding([one.images[0], other], tokens, two.outputs)
        return shown.fed(both, make(budget))

    return way


def regridded(make: Callable[[float | int], TokenReducer], choose: Callable[[Grid], Grid], as_many: bool = True) -> Way:
    """Return the way of a strategy with another tile grid.

    Args:
        make: the strategy at a budget.
        choose: rows x cols of the sub-images from height x width of the image in pixels.
        as_many: whether as many tokens stay as with the model's own grid, or the same share.
    """

    def way(shown: Shown, budget: float) -> Fed:
        size = (shown.board.pixels.shape[0], shown.board.pixels.shape[1])
        encoding = encode(shown.model, shown.processor, shown.board, choose(size))
        asked = as_budget(budget).asked(shown.encoding.images[0].geometry)
        return shown.fed(encoding, make(asked if as_many else budget))

    return way


def two_by_two(size: Grid) -> Grid:
    """Return the grid that VisPruner and CDPruner take for every image."""
    return 2, 2


def largest_used_share(size: Grid, grids: Sequence[Grid] = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))) -> Grid:
    """Return FasterVLM's choice: the grid whose canvas the image fills to the largest share, the first of equals.

    Args:
        size: height x width of the image in pixels.
        grids: rows x cols to choose from.
    """

    def share(grid: Grid) -> float:
        height, width = grid[0] * TILE, grid[1] * TILE
        scale = min(width / size[1], height / size[0])
        return int(size[1] * scale) * int(size[0] * scale) / (height * width)

    return max(grids, key=share)


# --- boards -----------------------------------------------------------------------------------------------------------


def all_boards(first: int) -> Iterator[Board]:
    """Yield held-out boards."""
    return (make_board(index, "heldout") for index in count(first))


def padded_sideways(first: int) -> Iterator[Board]:
    """Yield held-out boards that AnyRes pads left and right."""
    return (board for board in all_boards(first) if board.offset[1])


def gridded_otherwise(first: int) -> Iterator[Board]:
    """Yield held-out boards for which FasterVLM takes another tile grid than LLaVA-NeXT."""
    return (b for b in all_boards(first) if largest_used_share((b.pixels.shape[0], b.pixels.shape[1])) != b.grid)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Emulation:
    """One deviation that is no strategy's.

    Args:
        method: the name of the method.
        what: the deviation in words.
        own: what it is compared with.
        deviating: the way of the code.
        source: the boards that it is measured on.
        has_budget: whether the ways heed the budget.
    """

    method: str
    what: str
    own: Way
    deviating: Way
    source: Callable[[int], Iterator[Board]] = all_boards
    has_budget: bool = True


def emulations() -> list[Emulation]:
    """Return every deviation that is emulated, method by method."""

    def cdpruner(budget: float | int) -> TokenReducer:
        return replace(text_guided()[0], budget=budget)

    hired, globalcom2, faster = plain(HiRED), plain(GlobalCom2), plain(FasterVLM)
    cut_off = relaid(lambda budget: HiRED(budget, padding="ignore"), exchanged)
    grids = [("VisPruner", plain(VisPruner), VisPruner), ("CDPruner", plain(cdpruner), cdpruner)]
    wrong_places = relaid(GlobalCom2, misplaced)
    return [
        Emulation("HiRED", "rows and columns of the tile grid exchanged", hired, cut_off),
        Emulation("HiRED", "the release with that exchange", hired, relaid(HiRED.release, exchanged)),
        Emulation(
            "HiRED",
            "base tile only, mask of the first image of a batch",
            second_image(HiRED, alone=True, part=base_tile),
            second_image(HiRED, shared_mask, alone=True, part=base_tile),
        ),
        Emulation(
            "HiRED",
            "base tile only, mask of the first image of a prompt",
            second_image(HiRED, part=base_tile),
            second_image(HiRED, shared_mask, part=base_tile),
        ),
        Emulation("GlobalCom2", "tokens at their number inside the unpadded tile", globalcom2, wrong_places),
        Emulation(
            "GlobalCom2",
            "tokens at their number, boards padded at the sides only",
            globalcom2,
            wrong_places,
            padded_sideways,
        ),
        Emulation(
            "GlobalCom2",
            "second image of a batch by the attention of the first",
            globalcom2,
            second_image(GlobalCom2, shifted_attention, alone=True),
        ),
        Emulation(
            "GlobalCom2",
            "second image of a prompt by the attention of the first",
            second_image(GlobalCom2),
            second_image(GlobalCom2, shifted_attention),
        ),
        Emulation("HoloV", "zero vectors instead of missing tokens", plain(HoloV.release), zero_filled),
        Emulation(
            "PruMerge",
            "outliers counted over a batch of 8",
            plain(lambda _: PruMerge.release()),
            outliers_of_a_batch,
            has_budget=False,
        ),
        Emulation(
            "TRIM",
            "outliers counted over a batch of 8",
            plain(lambda _: adaptive(OutlierAllocation())),
            relevance_outliers_of_a_batch,
            has_budget=False,
        ),
        *(
            Emulation(name, what, own, regridded(make, two_by_two, as_many))
            for name, own, make in grids
            for what, as_many in (("2 x 2 tiles, as many tokens", True), ("2 x 2 tiles, the same share", False))
        ),
        Emulation("FasterVLM", "tile grid by the largest used share", faster, regridded(FasterVLM, largest_used_share)),
        Emulation(
            "FasterVLM",
            "that grid, boards where it is another one only",
            faster,
            regridded(FasterVLM, largest_used_share),
            gridded_otherwise,
        ),
    ]


def encode(model: Any, processor: Any, board: Board, grid: Grid | None = None) -> Encoding:
    """Encode a board with every signal that the emulated methods read.

    Args:
        model: the model.
        processor: its processor.
        board: the board.
        grid: rows x cols of the sub-images; the model's own choice if left out.
    """
    readers = (HiRED(), GlobalCom2(), HoloV(), PruMerge.release(), VisPruner(), *text_guided())
    needs: list[Signal] = [signal for reducer in readers for signal in reducer.needs]
    config = model.config
    own = config.image_grid_pinpoints
    config.image_grid_pinpoints = own if grid is None else [[grid[0] * TILE, grid[1] * TILE]]
    try:
        inputs = processor.image_processor(
            [board.image], image_grid_pinpoints=config.image_grid_pinpoints, return_tensors="pt"
        )
        with torch.no_grad():
            return find_adapter(model).encode(inputs, needs, text_model="mini")
    finally:
        config.image_grid_pinpoints = own


def prompts(processor: Any, questions: Sequence[str], lengths: Sequence[int]) -> dict[str, Tensor]:
    """Return the text inputs of one prompt per question, each with the same images.

    Args:
        processor: the processor.
        questions: the questions.
        lengths: tokens of each image.
    """
    texts, image = [], processor.image_token
    for question in questions:
        content = [{"type": "image"} for _ in lengths] + [{"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        head, *rest = text.split(image)
        texts.append(head + "".join(image * n + part for n, part in zip(lengths, rest, strict=True)))
    inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@dataclass
class Pairs:
    """What was measured of one emulation at one budget, board by board.

    Args:
        own: right (1) or wrong (0) per question, with what it is compared with.
        deviating: the same, the way of the code.
        tokens: tokens of the own form, those of them that the code does not have, and tokens of the code.
    """

    own: list[Answers] = field(default_factory=list)
    deviating: list[Answers] = field(default_factory=list)
    tokens: list[tuple[int, int, int]] = field(default_factory=list)

    def row(self) -> str:
        """Return the cells of a table: questions, tokens moved, budget lost, accuracy, its difference in points."""
        kept, moved, there = np.array(self.tokens).sum(axis=0)
        points = in_points([a - b for a, b in zip(self.deviating, self.own, strict=True)])
        own, questions = 100 * interval(self.own)[0], sum(map(len, self.own))
        return f"{questions:,} | {moved / kept:.1%} | {(kept - there) / kept:.1%} | {own:.1f} | {points}"


def measure(
    known: Sequence[Emulation], first: int, number: int, budgets: Sequence[float]
) -> dict[tuple[int, float], Pairs]:
    """Measure emulations on held-out boards.

    Args:
        known: the emulations.
        first: index of the first board; those before it fill the first batches.
        number: number of boards.
        budgets: budgets as ratios; ways without a budget are measured once.

    Returns:
        What was measured, by number of the emulation and budget.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(mini.path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(mini.path())
    found: dict[tuple[int, float], Pairs] = {}
    for source in dict.fromkeys(one.source for one in known):
        batch = [encode(model, processor, board) for board in boards(BATCH - 1, "heldout", first - BATCH + 1)]
        earlier = deque(batch, maxlen=BATCH - 1)
        for board in islice(source(first), number):
            shown = Shown(model, processor, board, encode(model, processor, board), list(earlier))
            answered: dict[tuple[Way, float], tuple[Fed, Answers]] = {}
            for place, one in enumerate(known):
                for budget in budgets[: None if one.has_budget else 1] if one.source is source else ():
                    for way in (one.own, one.deviating):
                        if (way, budget) not in answered:
                            answered[way, budget] = _answered(shown, way, budget)
                    (own, right), (other, others) = answered[one.own, budget], answered[one.deviating, budget]
                    pairs = found.setdefault((place, budget), Pairs())
                    pairs.own.append(right)
                    pairs.deviating.append(others)
                    pairs.tokens.append((len(own.tokens), len(own.tokens - other.tokens), len(other.tokens)))
            earlier.append(shown.encoding)
    return found


def _answered(shown: Shown, way: Way, budget: float) -> tuple[Fed, Answers]:
    """Return what entered the LLM, and which questions were answered rightly."""
    questions = shown.board.questions
    with torch.no_grad():
        fed = way(shown, budget)
        lengths = [len(features) for features in fed.encoding.packed]
        inputs = prompts(shown.processor, [question.text for question in questions], lengths)
        texts, _ = answer(shown.model, shown.processor, fed.encoding, inputs, fed.reducer)
    right = ["".join(text.split()) == question.answer for text, question in zip(texts, questions, strict=True)]
    return fed, np.array(right, dtype=np.int64)


def main(
    number: int = 125, first: int = 1000, budgets: list[float] | None = None, methods: list[str] | None = None
) -> None:
    """Measure every emulation and print the tables, method by method.

    Args:
        number: number of held-out boards.
        first: index of the first board.
        budgets: budgets as ratios; 5, 10 and 20 % if left out.
        methods: names of methods; all of them if left out.
    """
    known = [one for one in emulations() if methods is None or one.method in methods]
    found = measure(known, first, number, budgets or [0.05, 0.1, 0.2])
    for method in dict.fromkeys(one.method for one in known):
        print(f"\n{method}, {number} boards\n")
        print("| deviation | budget | questions | tokens moved | budget lost | compared with, % | difference, points |")
        print("|---|---|---|---|---|---|---|")
        for (place, budget), pairs in found.items():
            one = known[place]
            if one.method == method:
                share = f"{budget:.0%}" if one.has_budget else "its own"
                print(f"| {one.what} | {share} | {pairs.row()} |", flush=True)


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
