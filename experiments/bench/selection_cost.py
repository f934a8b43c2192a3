"""Measures the time of token selection relative to image encoding: every strategy on one image of LLaVA-NeXT's size.

Run it: ``tokenprune bench strategies``

The image has five tiles of 576 tokens. Its signals have the sizes of CLIP ViT-L/14-336 and a 7B model. Their values are
random, but smooth over the tile and heavy-tailed. The vision tower has random weights. Every repeat times the tower
first and then each strategy, so that both run under the same load of the machine. Needs about 3 GB of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokenprune.budget import parse_amount
from tokenprune.cli.parsing import load_classes
from tokenprune.geometry import TileGeometry
from tokenprune.image import (
    ALIGNED_SIGNALS,
    APPLICATION_SIGNALS,
    CLS_SIGNALS,
    ROW_SIGNALS,
    TEXT_SIGNALS,
    EncodedImage,
    Signal,
    token_dim,
)
from tokenprune.layers import resolve_layers
from tokenprune.registry import find_class
from tokenprune.stages import EntryStage
from tokenprune.testing.encoded_images import TOKEN_SIGNALS, random_encoded_image

BY_ATTENTION = frozenset({"FasterVLM", "GlobalCom2", "HiPrune", "HiRED", "HoloV", "VTCCLS"})
"""Strategies that rank tokens only by attention."""
ATTENTION_LIMIT = 2.0
"""Limit for strategies in `BY_ATTENTION`, in milliseconds."""
SHARE_LIMIT = 10.0
"""Limit for the remaining strategies, in percent of the time of the vision encode."""


@dataclass(frozen=True)
class SelectionCostConfig:
    """Options of `tokenprune bench strategies`.

    Args:
        names: names of strategies; by default all.
        plugin: Python files with further strategies.
        budget: budget: 0.2 or 20% (ratios; 1.0 or 100% keeps all tokens), 160 (tokens; 1 keeps one token).
        repeats: timed rounds of each strategy, after an untimed round.
        threads: CPU threads of torch.
    """

    names: list[str] | None = None
    plugin: list[str] = field(default_factory=list)
    budget: int | float | str = 0.2
    repeats: int = 5
    threads: int = 2


@dataclass(frozen=True)
class ModelSize:
    """The size of an image, a vision tower and an LLM; by default LLaVA-NeXT-7B with 2 x 2 sub-images.

    Args:
        tile_grid: rows x cols of the sub-images.
        side: side of the token grid of one tile.
        patch: side of a token in pixels.
        layers: layers of the vision tower; the second to last is the feature layer.
        heads: attention heads of the vision tower.
        width: width of the vision tower.
        intermediate: width of the feed-forward layers of the vision tower.
        shared: width of the embedding space shared with the text tower.
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
    def head_dim(self) -> int:
        """Width of an attention head of the vision tower."""
        return self.width // self.heads

    @property
    def geometry(self) -> TileGeometry:
        """A new layout of the image, without padding."""
        tile = self.side * self.patch
        rows, cols = self.tile_grid
        return TileGeometry.anyres((rows * tile, cols * tile), self.tile_grid, (self.side, self.side), tile)

    def build_vision_tower(self) -> Any:
        """Return a vision tower with random weights."""
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


TEXT_SHAPES = {"question": (1,), "question_tokens": (12,), "question_positions": (1, 77)}
"""Shape of each text signal without the width, for a short question."""


def list_signal_keys(needs: Sequence[Signal], size: ModelSize) -> list[tuple[str, int]]:
    """Return the (kind, layer index) of every signal that the selection reads, without duplicates."""
    signals = [signal for signal in needs if signal.kind not in APPLICATION_SIGNALS]
    resolved = [(signal.kind, resolve_layers(signal.layer, size.layers, size.layers - 2)) for signal in signals]
    return list(dict.fromkeys((kind, layer) for kind, layers in resolved for layer in layers))


def build_random_image(size: ModelSize, needs: Sequence[Signal]) -> EncodedImage:
    """Return an encoded image with random features and signals, which are smooth over the tile and heavy-tailed.

    Args:
        size: the size of the image and of the models.
        needs: the signals to build.

    Raises:
        ValueError: if the shape of a kind of signal is unknown.
    """
    keys = list_signal_keys(needs, size)
    unknown = sorted({kind for kind, _ in keys} - ROW_SIGNALS - CLS_SIGNALS - TEXT_SIGNALS - TOKEN_SIGNALS)
    if unknown:
        raise ValueError(f"cannot build the signal {', '.join(map(repr, unknown))}: its shape is unknown")
    geometry = size.geometry

    def draw(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        axis = token_dim(kind)
        if kind in CLS_SIGNALS | TEXT_SIGNALS:
            values = torch.randn(shape, generator=generator)
        else:
            channels = (*shape[1:axis], *shape[axis + 1 :])
            coarse = torch.randn(geometry.tiles, prod(channels), 6, 6, generator=generator)
            smooth = F.interpolate(coarse, geometry.token_grid, mode="bicubic", align_corners=False).flatten(2)
            values = smooth.unflatten(1, channels).movedim(-1, axis).contiguous()
        values = 2 * values + torch.empty_like(values).exponential_(generator=generator)
        return values.softmax(dim=-1) if kind in ROW_SIGNALS - {"cls_logits"} else values

    text = dict.fromkeys(ALIGNED_SIGNALS | TEXT_SIGNALS, size.shared)
    return random_encoded_image(
        geometry,
        heads=size.heads,
        dim=size.dim,
        keys=keys,
        draw=draw,
        widths={**text, **dict.fromkeys(("vision_features", "cls_features"), size.width), "keys": size.head_dim},
        text_shapes=TEXT_SHAPES,
        layers=size.layers,
        feature_layer=size.layers - 2,
    )


@dataclass(frozen=True)
class Cost:
    """Times of one strategy and of the vision encode.

    Args:
        name: name of the strategy.
        select_ms: time of each selection in milliseconds, `[repeats]`.
        encode_ms: time of the vision encode in the same repeat in milliseconds, `[repeats]`.
    """

    name: str
    select_ms: tuple[float, ...]
    encode_ms: tuple[float, ...]

    @property
    def share(self) -> float:
        """Selection time in percent of the encode in the same repeat, median."""
        return median(100 * select / encode for select, encode in zip(self.select_ms, self.encode_ms, strict=True))

    @property
    def target(self) -> str:
        """The limit of the strategy, with its unit."""
        return f"{ATTENTION_LIMIT:g} ms" if self.name in BY_ATTENTION else f"{SHARE_LIMIT:g} %"

    @property
    def is_met(self) -> bool:
        """Whether the time of the strategy is below its limit."""
        return median(self.select_ms) < ATTENTION_LIMIT if self.name in BY_ATTENTION else self.share < SHARE_LIMIT


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Set the number of CPU threads of torch inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_call(call: Callable[[], object]) -> float:
    """Return the time of a call in milliseconds."""
    start = perf_counter()
    call()
    return 1000 * (perf_counter() - start)


def measure_strategies(
    config: SelectionCostConfig, size: ModelSize | None = None, on_progress: Callable[[str], object] = str
) -> list[Cost]:
    """Time strategies and the vision encode of the same image in turns.

    Args:
        config: the options.
        size: the size of the image and of the models; None uses the size of LLaVA-NeXT-7B.
        on_progress: receives the name of each measurement before it starts.

    Raises:
        LookupError: if there is no strategy before the LLM of a name.
        ValueError: if the budget is neither a ratio nor a count, or a strategy reads a signal of an unknown kind.
    """
    catalog, _ = load_classes(config.plugin)
    timed = {
        name: kind
        for name, kind in catalog.items()
        if isinstance(kind.stage, EntryStage) and not kind.stage.reads_tower_layer
    }
    classes = [find_class(name, timed, "strategy before the LLM") for name in config.names or timed]
    budget = parse_amount(config.budget)
    reducers = {strategy.__name__: strategy(budget) for strategy in classes}
    size = size or ModelSize()
    image = build_random_image(size, [signal for reducer in reducers.values() for signal in reducer.needs])
    signals = {
        name: {key: image.signals[key] for key in list_signal_keys(reducer.needs, size)}
        for name, reducer in reducers.items()
    }
    tower = size.build_vision_tower()
    pixels = torch.randn(image.geometry.tiles, 3, size.side * size.patch, size.side * size.patch)
    encodes: list[float] = []
    selects: dict[str, list[float]] = {name: [] for name in reducers}
    with torch_threads(config.threads), torch.inference_mode():
        for number in range(1 + config.repeats):
            on_progress(f"round {number} of {config.repeats}, vision encode")
            encodes.append(time_call(lambda: tower(pixels)))
            for name, reducer in reducers.items():
                on_progress(f"round {number} of {config.repeats}, {name}")
                # A new layout for each call, because a layout caches computed properties.
                fresh_image = replace(image, geometry=size.geometry, signals=signals[name])
                selects[name].append(time_call(partial(reducer.reduce, fresh_image)))
    return [Cost(name, tuple(times[1:]), tuple(encodes[1:])) for name, times in selects.items()]


def format_costs(costs: Sequence[Cost]) -> str:
    """Return the costs of strategies as a Markdown table."""

    def format_times(times: Sequence[float], digits: int) -> str:
        return f"{median(times):.{digits}f} [{min(times):.{digits}f}, {max(times):.{digits}f}]"

    lines = [
        f"Vision encode: {format_times(costs[0].encode_ms, 0)} ms. Medians of {len(costs[0].encode_ms)} and ranges.\n"
    ]
    lines += ["| strategy | selection in ms | % of the encode | target | met |", "|---|---|---|---|---|"]
    for cost in costs:
        times, is_met = format_times(cost.select_ms, 2), "yes" if cost.is_met else "no"
        lines.append(f"| {cost.name} | {times} | {cost.share:.2f} | < {cost.target} | {is_met} |")
    return "\n".join(lines)
