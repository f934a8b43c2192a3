"""What choosing tokens costs beside encoding the image: every strategy on one image of LLaVA-NeXT's full size.

Run it: ``python -m tokenprune.experiments.bench.selection_cost``

The image has five tiles of 576 tokens with signals of the sizes that CLIP ViT-L/14-336 and a 7B model give them; they
are random, but smooth over the tile and heavy-tailed. The vision tower has random weights. Every repeat times the tower
first and then each strategy, so that both meet the same machine. Needs about 3 GB of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokenprune.catalog import strategies
from tokenprune.image import USED_WHEN_ATTACHED, EncodedImage, Signal, TileGeometry
from tokenprune.layers import resolve_layers
from tokenprune.reducer import TokenReducer
from tokenprune.registry import lookup

BY_ATTENTION = frozenset({"FasterVLM", "GlobalCom2", "HiPrune", "HiRED", "HoloV", "VTCCLS"})
"""Strategies that rank tokens by attention alone."""
ATTENTION_LIMIT = 2.0
"""Milliseconds that these may take."""
SHARE_LIMIT = 10.0
"""Percent of the vision encode that any other strategy may take."""


@dataclass(frozen=True)
class Size:
    """The size of an image and of the models around it; by default LLaVA-NeXT-7B with 2 x 2 sub-images.

    Args:
        tile_grid: rows x cols of the sub-images.
        side: rows and columns of the tokens of one tile.
        patch: pixels at the side of a token.
        layers: layers of the vision tower; the last but one is the feature layer.
        heads: its attention heads.
        width: its width.
        intermediate: width of its feed-forward layers.
        shared: width of the space shared with the text tower.
        dim: width of the LLM.
    """

    tile_grid: tuple[int, int] = (2, 2)
    side: int = 24
    patch: int = 14
    layers: int = 24
    heads: int = 16
    width: int = 1024
    intermediate: int = 4096
    shared: int = 768
    dim: int = 4096

    @property
    def geometry(self) -> TileGeometry:
        """A new layout of an image without padding."""
        tile = self.side * self.patch
        rows, cols = self.tile_grid
        return TileGeometry.anyres((rows * tile, cols * tile), self.tile_grid, (self.side, self.side), tile)

    def vision_tower(self) -> Any:
        """A vision tower with random weights."""
        config = CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.side * self.patch,
            patch_size=self.patch,
            projection_dim=self.shared,
        )
        return CLIPVisionModel(config).eval()


Field = Callable[[int], Tensor]
"""From a number of channels to random numbers, `[tiles, channels, tokens]`."""

KINDS: Mapping[str, Callable[[Size, Field], Tensor]] = {
    "cls_attention": lambda size, field: field(size.heads).softmax(dim=-1),
    "cls_logits": lambda size, field: field(size.heads),
    "received_attention": lambda size, field: field(size.heads).softmax(dim=-1),
    "joint_attention": lambda size, field: field(1).softmax(dim=-1),
    "keys": lambda size, field: rearrange(
        field(size.width), "tiles (heads dim) tokens -> tiles heads tokens dim", heads=size.heads
    ),
    "vision_features": lambda size, field: field(size.width).mT.contiguous(),
    "cls_features": lambda size, field: field(size.width)[..., :1].mT.contiguous(),
    "aligned_features": lambda size, field: field(size.shared).mT.contiguous(),
    "aligned_cls": lambda size, field: field(size.shared)[..., :1].mT.contiguous(),
    "question": lambda size, field: field(size.shared)[0, :, :1].mT.contiguous(),
    "question_tokens": lambda size, field: field(size.shared)[0, :, :12].mT.contiguous(),
    "question_positions": lambda size, field: field(size.shared)[:1, :, :77].mT.contiguous(),
}
"""How each kind of signal is made up."""


def wanted(needs: Sequence[Signal], size: Size) -> list[tuple[str, int]]:
    """Return the (kind, layer index) of every signal that choosing tokens takes, each once."""
    signals = [signal for signal in needs if signal.kind not in USED_WHEN_ATTACHED]
    layers = [resolve_layers(signal.layer, size.layers, size.layers - 2) for signal in signals]
    return list(dict.fromkeys((s.kind, index) for s, found in zip(signals, layers, strict=True) for index in found))


def made_up_image(size: Size, needs: Sequence[Signal], seed: int = 0) -> EncodedImage:
    """Return an encoded image with random features and signals: smooth over the tile, with a heavy tail.

    Args:
        size: the size of the image and of the models.
        needs: the signals to build.
        seed: seed of the random numbers.

    Raises:
        ValueError: if a kind of signal is not in `KINDS`.
    """
    unknown = sorted({kind for kind, _ in wanted(needs, size)} - set(KINDS))
    if unknown:
        raise ValueError(f"no signal {', '.join(map(repr, unknown))} can be made up; say in KINDS how")
    generator = torch.Generator().manual_seed(seed)
    geometry = size.geometry

    def field(channels: int) -> Tensor:
        coarse = torch.randn(geometry.tiles, channels, 6, 6, generator=generator)
        smooth = F.interpolate(coarse, geometry.token_grid, mode="bicubic", align_corners=False).flatten(2)
        return 2 * smooth + torch.empty_like(smooth).exponential_(generator=generator)

    signals = {key: KINDS[key[0]](size, field) for key in wanted(needs, size)}
    return EncodedImage(geometry, field(size.dim).mT.contiguous(), signals, size.layers, size.layers - 2)


@dataclass(frozen=True)
class Cost:
    """What one strategy took.

    Args:
        name: the strategy.
        select_ms: milliseconds of each selection, `[repeats]`.
        encode_ms: milliseconds of the vision encode before each, `[repeats]`.
    """

    name: str
    select_ms: tuple[float, ...]
    encode_ms: tuple[float, ...]

    @property
    def share(self) -> float:
        """Selection in percent of the encode beside it, median."""
        return median(100 * one / other for one, other in zip(self.select_ms, self.encode_ms, strict=True))

    @property
    def target(self) -> str:
        """What the strategy should stay below."""
        return f"{ATTENTION_LIMIT:g} ms" if self.name in BY_ATTENTION else f"{SHARE_LIMIT:g} %"

    @property
    def met(self) -> bool:
        """Whether it does."""
        return median(self.select_ms) < ATTENTION_LIMIT if self.name in BY_ATTENTION else self.share < SHARE_LIMIT


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch use this many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds that a call takes."""
    start = perf_counter()
    call()
    return 1000 * (perf_counter() - start)


def measure(
    names: Sequence[str] | None = None,
    budget: float = 0.2,
    repeats: int = 5,
    threads: int = 2,
    size: Size | None = None,
    known: Mapping[str, Any] | None = None,
) -> list[Cost]:
    """Time strategies and the vision encode of the same image in turns.

    Args:
        names: strategies to measure; all known ones if left out.
        budget: budget as a ratio.
        repeats: how often each is timed, after one untimed round.
        threads: CPU threads of torch.
        size: the size of the image and of the models; the full one if left out.
        known: strategies by class name; those that are shipped or installed if left out.

    Raises:
        LookupError: if a strategy is not known.
        ValueError: if one reads a signal that cannot be made up.
    """
    shipped: Mapping[str, Any] = strategies() if known is None else known
    found = [lookup(name, shipped, "strategy") for name in names or shipped]
    reducers: dict[str, TokenReducer] = {one.__name__: one(budget) for one in found}
    size = size or Size()
    image = made_up_image(size, [signal for reducer in reducers.values() for signal in reducer.needs])
    signals = {n: {key: image.signals[key] for key in wanted(one.needs, size)} for n, one in reducers.items()}
    tower = size.vision_tower()
    pixels = torch.randn(image.geometry.tiles, 3, size.side * size.patch, size.side * size.patch)
    encodes: list[float] = []
    selects: dict[str, list[float]] = {name: [] for name in reducers}
    with torch_threads(threads), torch.inference_mode():
        for _ in range(1 + repeats):
            encodes.append(timed(lambda: tower(pixels)))
            for name, reducer in reducers.items():
                # A layout remembers what it worked out; that of the next image has yet to.
                one = replace(image, geometry=size.geometry, signals=signals[name])
                selects[name].append(timed(lambda reducer=reducer, one=one: reducer.reduce(one)))  # type: ignore[misc]
    return [Cost(name, tuple(times[1:]), tuple(encodes[1:])) for name, times in selects.items()]


def report(costs: Sequence[Cost]) -> str:
    """Return the costs as a Markdown table."""

    def cell(times: Sequence[float], digits: int) -> str:
        return f"{median(times):.{digits}f} [{min(times):.{digits}f}, {max(times):.{digits}f}]"

    lines = [f"Vision encode: {cell(costs[0].encode_ms, 0)} ms. Medians of {len(costs[0].encode_ms)} and ranges.\n"]
    lines += ["| strategy | selection in ms | % of the encode | target | met |", "|---|---|---|---|---|"]
    for cost in costs:
        met = "yes" if cost.met else "no"
        lines.append(f"| {cost.name} | {cell(cost.select_ms, 2)} | {cost.share:.2f} | < {cost.target} | {met} |")
    return "\n".join(lines)


def main(names: list[str] | None = None, budget: float = 0.2, repeats: int = 5, threads: int = 2) -> None:
    """Measure strategies and print the table.

    Args:
        names: strategies to measure; all known ones if left out.
        budget: budget as a ratio.
        repeats: how often each is timed.
        threads: CPU threads of torch.
    """
    print(report(measure(names, budget, repeats, threads)))


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False)
