"""Token, KV-cache and FLOP accounting of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from tokenprune.adapter import LLMShape
from tokenprune.display import format_count, format_table
from tokenprune.encoder.patches import PatchRecord
from tokenprune.selection import Selection

HISTORY = 1000
"""Number of images, and of prompt rows, whose entries an account stores; totals cover all images and rows."""


def kv_bytes(shape: LLMShape, length: int) -> int:
    """Return the bytes of the KV cache of a prompt with the same length in all layers.

    Args:
        shape: the decoder.
        length: tokens in the prompt.
    """
    return LayerSums.from_rows(shape, [length] * shape.layers).kv_bytes(shape)


def prefill_flops(shape: LLMShape, length: int) -> int:
    """Return the FLOPs of a prefill that computes one next token, as torch counts them under eager attention.

    A multiply-add is two FLOPs. The count includes all linear maps of the model (three of a gated MLP) and the full
    square of attention. It does not include norms, activations and softmax. The widespread formula
    ``4nd^2 + 2n^2d + 2ndm`` per layer counts multiply-adds and a two-matrix MLP, which is less than half of this count
    for LLaMA.

    Args:
        shape: the decoder.
        length: tokens in the prompt, equal in all layers.
    """
    return LayerSums.from_rows(shape, [length] * shape.layers).flops(shape)


@dataclass(frozen=True)
class RowLengths:
    """The numbers of tokens of one prompt row, without padding. It unpacks as ``full, reduced = lengths``.

    Args:
        full: tokens without reduction.
        layers: tokens in each LLM layer, first layer first. A decoder strategy shortens later layers.
    """

    full: int
    layers: tuple[int, ...]

    @property
    def reduced(self) -> int:
        """Tokens that entered the LLM, which are the tokens of the first layer."""
        return self.layers[0]

    @property
    def average(self) -> float:
        """Tokens, averaged over the LLM layers."""
        return sum(self.layers) / len(self.layers)

    def __iter__(self) -> Iterator[int]:
        """Yield the tokens without reduction and the tokens that entered the LLM."""
        return iter((self.full, self.reduced))


def average_over_layers(entered: float, cuts: Mapping[int, float], layers: int) -> float:
    """Return a property of the visual tokens, such as their number, averaged over the layers of an LLM.

    Args:
        entered: value for the tokens that entered the LLM.
        cuts: value for the tokens that remained at each cut, by the first layer without the dropped tokens.
        layers: number of layers of the LLM.
    """
    starts = [0, *sorted(cuts), layers]
    values = [entered, *(cuts[layer] for layer in sorted(cuts))]
    return sum(value * (stop - start) for value, (start, stop) in zip(values, pairwise(starts), strict=True)) / layers


@dataclass
class LayerSums:
    """Sums over prompt rows, from which cache bytes and FLOPs follow exactly.

    Args:
        rows: number of rows.
        lengths: sum of the lengths, per layer.
        squares: sum of the squared lengths, per layer.
    """

    lengths: list[int]
    squares: list[int]
    rows: int = 0

    @classmethod
    def from_rows(cls, shape: LLMShape, *rows: Sequence[int]) -> LayerSums:
        """Return the sums over prompt rows.

        Args:
            shape: the decoder.
            rows: tokens of each row in each layer.
        """
        sums = cls([0] * shape.layers, [0] * shape.layers)
        for row in rows:
            sums.add(row)
        return sums

    def add(self, layers: Sequence[int]) -> None:
        """Add one row.

        Args:
            layers: tokens in each layer.
        """
        self.rows += 1
        for layer, length in enumerate(layers):
            self.lengths[layer] += length
            self.squares[layer] += length * length

    def kv_bytes(self, shape: LLMShape) -> int:
        """Return the bytes of the KV caches of all rows."""
        return 2 * shape.kv_heads * shape.head_dim * shape.element_bytes * sum(self.lengths)

    def flops(self, shape: LLMShape) -> int:
        """Return the FLOPs of the prefills of all rows; see `prefill_flops`."""
        linear = sum(2 * weights * n for weights, n in zip(shape.layer_parameters, self.lengths, strict=True))
        attention = 4 * shape.heads * shape.head_dim * sum(self.squares)
        return linear + attention + 2 * shape.head_parameters * self.rows


@dataclass(frozen=True)
class ImageAccount:
    """The numbers of tokens of one image.

    Args:
        asked: tokens that the budget granted.
        kept: visual tokens that entered the LLM, without newline tokens.
        valid: visual tokens that enter the LLM without reduction.
        encoded: tokens of all tiles after the vision side, padding included.
        newlines: newline tokens that entered the LLM.
        newlines_full: newline tokens that enter the LLM without reduction.
        granted_per_tile: tokens granted to each tile, base tile first.
        kept_per_tile: kept tokens of each tile, base tile first.
    """

    asked: int
    kept: int
    valid: int
    encoded: int
    newlines: int
    newlines_full: int
    granted_per_tile: tuple[int, ...]
    kept_per_tile: tuple[int, ...]

    @classmethod
    def from_selection(cls, selection: Selection) -> ImageAccount:
        """Return the account of one selection."""
        geometry = selection.geometry
        return cls(
            asked=selection.asked,
            kept=selection.kept_tokens,
            valid=geometry.valid_tokens,
            encoded=geometry.tiles * geometry.tokens,
            newlines=selection.kept_newlines,
            newlines_full=geometry.newlines,
            granted_per_tile=tuple(selection.granted_per_tile),
            kept_per_tile=tuple(selection.kept_per_tile),
        )


@dataclass
class ImageTotals:
    """Sums over images, before the LLM or at a cut inside it.

    Args:
        images: number of images.
        asked: tokens that the budget granted.
        kept: visual tokens that entered the LLM, or remain after the cut, without newline tokens.
        valid: visual tokens that enter the LLM without reduction, or the tokens before the cut.
        newlines: newline tokens that entered the LLM, or remain after the cut.
    """

    images: int = 0
    asked: int = 0
    kept: int = 0
    valid: int = 0
    newlines: int = 0

    def add(self, selection: Selection) -> None:
        """Add one image."""
        self.images += 1
        self.asked += selection.asked
        self.kept += selection.kept_tokens
        self.valid += selection.geometry.valid_tokens
        self.newlines += selection.kept_newlines


@dataclass
class TokenAccount:
    """Tokens, cache bytes and FLOPs of all calls of a run.

    Memory is bounded: totals are running sums over all calls, and entries are stored for the last `HISTORY` images and
    prompt rows. Only `add` changes them.

    Args:
        llm: the shape of the language model.
        attention: source of the attention that the strategy read; None if it read no attention.
        saliency_flops: FLOPs of a saliency model that read the images; 0 without a saliency model.
        signal_flops: FLOPs of the signals of the LLM that a strategy inside it read.
        tower_patches: patches in the layers of the vision tower, summed over tiles and layers; 0 if no strategy acts
            before or inside it.
        tower_patches_full: these patches without reduction.
        shortens_prompt: whether tokens whose patches were dropped or merged in the tower do not enter the LLM. If
            tokens consist of several patches, or dropped patches were restored, all tokens enter.
    """

    llm: LLMShape
    attention: str | None = None
    saliency_flops: int = 0
    signal_flops: int = 0
    tower_patches: int = 0
    tower_patches_full: int = 0
    shortens_prompt: bool = False
    prompt_lengths: deque[RowLengths] = field(default_factory=lambda: deque(maxlen=HISTORY), init=False)
    """One entry per prompt row, in the order of the calls; the last `HISTORY` of them."""

    def __post_init__(self) -> None:
        """Set all totals to zero."""
        self._images = ImageTotals()
        self._entries: deque[Selection | ImageAccount] = deque(maxlen=HISTORY)
        self._full = LayerSums.from_rows(self.llm)
        self._reduced = LayerSums.from_rows(self.llm)
        self._cuts: dict[int, ImageTotals] = {}
        self._average_tokens = 0.0

    def add(
        self,
        selections: Sequence[Selection],
        lengths: Sequence[RowLengths | tuple[int, int]],
        cuts: Mapping[int, Sequence[Selection]] = MappingProxyType({}),
    ) -> None:
        """Add the images and prompt rows of one call.

        Args:
            selections: the selection of each image.
            lengths: tokens of each prompt row; a pair (full, reduced) means the reduced length in all layers.
            cuts: the selection of each image at each cut inside the LLM, by the first layer without dropped tokens.

        Raises:
            ValueError: if the number of lengths of a row differs from the number of LLM layers.
        """
        layers = self.llm.layers
        rows = [row if isinstance(row, RowLengths) else RowLengths(row[0], (row[1],) * layers) for row in lengths]
        for row in rows:
            if len(row.layers) != layers:
                raise ValueError(
                    f"a prompt row has lengths for {len(row.layers)} layers, but the LLM has {layers}; "
                    "pass one length per layer"
                )
        kept_at_cuts = {layer: sum(s.kept_tokens for s in kept) for layer, kept in cuts.items()}
        entered = sum(selection.kept_tokens for selection in selections)
        self._average_tokens += average_over_layers(entered, kept_at_cuts, layers)
        for row in rows:
            self._full.add((row.full,) * layers)
            self._reduced.add(row.layers)
        self.prompt_lengths.extend(rows)
        for selection in selections:
            self._images.add(selection)
        self._entries.extend(selections)
        for layer, selections_of_cut in cuts.items():
            totals = self._cuts.setdefault(layer, ImageTotals())
            for selection in selections_of_cut:
                totals.add(selection)

    def add_patches(self, patches: PatchRecord) -> None:
        """Add the patches of the vision tower of one call.

        Args:
            patches: the patches that remained in the tower.
        """
        self.tower_patches += patches.patches
        self.tower_patches_full += patches.patches_full
        self.shortens_prompt = patches.kept is not None

    @property
    def cuts(self) -> dict[int, ImageTotals]:
        """The sums over images at each cut inside the LLM, by the first layer without dropped tokens, ascending.

        `valid` counts the tokens before the cut.
        """
        return {layer: self._cuts[layer] for layer in sorted(self._cuts)}

    @property
    def images(self) -> list[ImageAccount]:
        """One entry per image, in the order of the calls; the last `HISTORY` of them."""
        entries = [e if isinstance(e, ImageAccount) else ImageAccount.from_selection(e) for e in self._entries]
        self._entries = deque(entries, maxlen=HISTORY)
        return entries

    @property
    def image_count(self) -> int:
        """Number of images of all calls."""
        return self._images.images

    @property
    def row_count(self) -> int:
        """Number of prompt rows of all calls."""
        return self._reduced.rows

    @property
    def asked(self) -> int:
        """Tokens granted to all images."""
        return self._images.asked

    @property
    def kept(self) -> int:
        """Visual tokens of all images that entered the LLM, without newline tokens."""
        return self._images.kept

    @property
    def valid(self) -> int:
        """Visual tokens of all images that enter the LLM without reduction, without newline tokens."""
        return self._images.valid

    @property
    def newlines(self) -> int:
        """Newline tokens of all images that entered the LLM."""
        return self._images.newlines

    @property
    def prompt_length(self) -> int:
        """Tokens of all prompt rows that entered the LLM."""
        return self._reduced.lengths[0]

    @property
    def prompt_length_full(self) -> int:
        """Tokens of all prompt rows without reduction."""
        return self._full.lengths[0]

    @property
    def tokens_per_layer(self) -> list[int]:
        """Prompt tokens of all rows in each LLM layer; equal in all layers for reduction before the LLM."""
        return list(self._reduced.lengths)

    @property
    def average_tokens(self) -> float:
        """Visual tokens of a prompt row, averaged over LLM layers and rows, as in "192 tokens" of papers.

        Newline tokens are not counted. The value is 0.0 before the first call.
        """
        return self._average_tokens / self.row_count if self.row_count else 0.0

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache after prefill, all rows."""
        return self._reduced.kv_bytes(self.llm)

    @property
    def kv_bytes_full(self) -> int:
        """Bytes of the KV cache without reduction, all rows."""
        return self._full.kv_bytes(self.llm)

    @property
    def flops(self) -> int:
        """FLOPs of prefill in the LLM, all rows."""
        return self._reduced.flops(self.llm)

    @property
    def flops_full(self) -> int:
        """FLOPs of prefill in the LLM without reduction, all rows."""
        return self._full.flops(self.llm)

    def summary(self) -> dict[str, Any]:
        """Return the totals as plain numbers, and the source of the attention."""
        return {
            "images": self.image_count,
            "asked": self.asked,
            "kept": self.kept,
            "valid": self.valid,
            "newlines": self.newlines,
            "average_tokens": self.average_tokens,
            "cuts": [{"layer": n, "asked": cut.asked, "kept": cut.kept} for n, cut in self.cuts.items()],
            "prompts": self.row_count,
            "prompt_length": self.prompt_length,
            "prompt_length_full": self.prompt_length_full,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_full": self.kv_bytes_full,
            "prefill_flops": self.flops,
            "prefill_flops_full": self.flops_full,
            "saliency_flops": self.saliency_flops,
            "signal_flops": self.signal_flops,
            "tower_patches": self.tower_patches,
            "tower_patches_full": self.tower_patches_full,
            "attention": self.attention,
        }

    def __str__(self) -> str:
        """Return a readable summary on one line."""
        if not self.row_count:
            return "no image was reduced"
        parts = [
            f"{format_count(self.image_count, 'image')}: {self.asked} tokens asked, "
            f"{self.kept} kept of {self.valid} valid",
            *(f"from layer {layer}: {cut.asked} asked, {cut.kept} kept" for layer, cut in self.cuts.items()),
            f"KV cache {self.kv_bytes / self.kv_bytes_full:.1%} and prefill FLOPs "
            f"{self.flops / self.flops_full:.1%} of full",
        ]
        if self._cuts:
            average = f"{self.average_tokens:.1f} visual tokens per prompt on average over {self.llm.layers} layers"
            parts.insert(-1, average)
        if self.tower_patches_full:
            ratio = f"vision tower: {self.tower_patches / self.tower_patches_full:.1%} of patches x layers"
            place = "saved in tower and LLM" if self.shortens_prompt else "saved in the tower only"
            parts.append(ratio if self.tower_patches == self.tower_patches_full else f"{ratio} ({place})")
        if self.attention is not None:
            parts.append(f"attention: {self.attention}")
        if self.signal_flops:
            parts.append(f"signals of the LLM: {self.signal_flops / self.flops_full:.2%} of the full prefill FLOPs")
        if self.saliency_flops:
            parts.append(f"saliency model: {self.saliency_flops / 1e9:.2f} GFLOPs")
        return "; ".join(parts)

    def _repr_html_(self) -> str:
        """Return the totals as an HTML table for Jupyter, with all tokens and the reduced prompt side by side."""
        if not self.row_count:
            return f"<p>{self}</p>"
        pairs = [
            ("visual tokens", self.valid, self.kept, "{:,}"),
            ("prompt tokens", self.prompt_length_full, self.prompt_length, "{:,}"),
            ("KV cache after prefill (MB)", self.kv_bytes_full / 1e6, self.kv_bytes / 1e6, "{:,.2f}"),
            *[("vision tower (patches x layers)", self.tower_patches_full, self.tower_patches, "{:,}")]
            * bool(self.tower_patches_full),
            ("LLM prefill (GFLOP)", self.flops_full / 1e9, self.flops / 1e9, "{:,.2f}"),
        ]
        rows = [
            [name, style.format(full), style.format(reduced), f"{reduced / full:.1%}" if full else ""]
            for name, full, reduced, style in pairs
        ]
        layers = " ".join(map(str, self.tokens_per_layer))
        caption = f"{format_count(self.image_count, 'image')}, {self.asked} tokens asked"
        table = format_table(["", "all tokens", "reduced", "ratio"], rows, caption)
        return f"{table}<small>prompt tokens per LLM layer: {layers}</small>"
