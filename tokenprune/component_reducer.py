"""Strategies of exchangeable components: allocation, selection, merging and output order."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tokenprune.budget import as_budget, copy_to_device
from tokenprune.checks import defer_checks
from tokenprune.contracts import describe_value, locate_method, require_allocation, require_tensor
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage, Signal
from tokenprune.policies import AllocationPolicy, Merged, MergingPolicy, OrderPolicy, SelectionPolicy
from tokenprune.reducer import TokenReducer, score_candidates
from tokenprune.selection import Selection, store_row_counts, true_indices


@dataclass
class ComponentReducer(TokenReducer):
    """A strategy of exchangeable components: the allocation divides the budget over the tiles, the selection spends it.

    Args:
        allocation: divides the budget over the tiles.
        selection: selects tokens inside each tile.
        merging: merges dropped tokens into kept ones; None drops them.
        order: the order in which kept tokens enter the LLM; None keeps the packed order of the model. An order needs
            ``positions="reindex"``.
        padding: ``"exclude"`` selects only tokens that remain after the unpadding of the model. ``"ignore"`` selects
            among all tokens and loses the padding afterwards, as published code does. Fewer tokens than asked are then
            kept.
    """

    allocation: AllocationPolicy = field(kw_only=True)
    selection: SelectionPolicy = field(kw_only=True)
    merging: MergingPolicy | None = field(default=None, kw_only=True)
    order: OrderPolicy | None = field(default=None, kw_only=True)
    padding: Literal["exclude", "ignore"] = field(default="exclude", kw_only=True)

    def __post_init__(self) -> None:
        """Check the options when the strategy is created."""
        for name, base, is_optional in (
            ("allocation", AllocationPolicy, False),
            ("selection", SelectionPolicy, False),
            ("merging", MergingPolicy, True),
            ("order", OrderPolicy, True),
        ):
            component = getattr(self, name)
            if not isinstance(component, base) and not (is_optional and component is None):
                raise ValueError(
                    f"{name}={component!r} is no {base.__name__}; pass an instance of a subclass"
                    f"{f', {component.__name__}()' if inspect.isclass(component) else ''}"
                )
        super().__post_init__()
        if self.order is not None and self.positions == "preserve":
            raise ValueError(
                f"order={self.order!r} moves tokens, so their old position ids do not apply; "
                "use positions='reindex', or order=None"
            )

    @property
    def needs(self) -> Sequence[Signal]:
        """The signals that the components read."""
        components = (self.allocation, self.selection, self.merging, self.order)
        return [signal for component in components if component is not None for signal in component.needs]

    @property
    def is_single_graph(self) -> bool:
        """Whether `select` is one graph: an exact allocation, a ranking of scores, no merging, order or counting."""
        ranks_scores = type(self.selection).pick is SelectionPolicy.pick
        is_counted = as_budget(self.budget).newlines == "counted"
        is_simple = self.merging is None and self.order is None and not is_counted
        return is_simple and ranks_scores and self.allocation.is_exact

    def select(self, image: EncodedImage) -> Selection:
        """Divide the budget over the tiles, then select tokens inside each tile, or among all tiles in one pool."""
        geometry, device = image.geometry.to(image.device), image.device
        if self.allocation.pools_tiles and geometry.sub_images:
            flat_index = geometry.token_order[None]
            image = image.flatten_tiles()
        else:
            flat_index = torch.arange(geometry.tiles * geometry.tokens, device=device).view(geometry.tiles, -1)
        layout = image.geometry.to(device)
        capacity = layout.valid_per_tile if self.padding == "exclude" else (layout.tokens,) * layout.tiles
        candidates = store_row_counts(self._find_candidates(layout.valid), capacity)
        scores = score_candidates(self.selection, image, candidates)
        attempts: list[tuple[Tensor, Tensor, Merged | None]] = []  # one entry per call of select_tokens

        def scatter_to_tiles(values: Tensor, fill: float) -> Tensor:
            if flat_index.shape == (geometry.tiles, geometry.tokens):
                return values
            flat = values.new_full((geometry.tiles * geometry.tokens,), fill)
            return flat.scatter(0, flat_index.flatten(), values.flatten()).view(geometry.tiles, geometry.tokens)

        def select_tokens(number: int) -> tuple[Tensor, Sequence[int] | Tensor]:
            granted = self.allocation.allocate(image, number, capacity, scores)
            granted = require_allocation(granted, self.allocation, layout.tiles)
            budgets = granted if isinstance(granted, Tensor) else copy_to_device(granted, device)
            kept, merged = self._pick(image, scores, budgets, candidates, number >= sum(capacity))
            kept = kept & layout.valid
            mask = scatter_to_tiles(kept, False)
            attempts.append((mask, kept, merged))
            return mask, mask.sum(dim=1) if self.allocation.pools_tiles else granted

        tile_scores = scatter_to_tiles(scores, -torch.inf)
        selection = self.select_within_budget(image, select_tokens, tile_scores, sum(capacity), geometry)
        kept, merged = next((kept, merged) for mask, kept, merged in attempts if mask is selection.kept)
        count = self._count_kept(selection, layout)
        if count is not None:
            selection = selection.with_token_count(count)
        if merged is None and self.order is None:
            return selection
        is_kept = selection.kept.flatten()[geometry.token_order]
        kept_order = is_kept.nonzero()[:, 0] if count is None else true_indices(is_kept, count)
        kept_index = geometry.token_order[kept_order]  # flat index of each kept token, in packed order
        local = kept_index  # index of each kept token in the image that the components read
        if image.geometry.original is not geometry.original:  # the tiles are pooled
            local = torch.zeros(geometry.tiles * geometry.tokens, dtype=torch.long, device=device)
            local = local.scatter(0, flat_index.flatten(), torch.arange(flat_index.numel(), device=device))[kept_index]
        mixing, order = None, None
        kind = torch.zeros_like(kept, dtype=torch.long) if merged is None else merged.kind
        if merged is not None:
            mixing = _build_mixing(merged.weights, local, flat_index, geometry)
        if self.order is not None:
            rank = require_tensor(
                self.order.rank(image, scores, kept, kind), self.order, "rank", "[tiles, tokens]", kept.shape, "real"
            )
            order = rank.flatten()[local].argsort(stable=True)
        mixes_inputs = self.merging is not None and self.merging.before_projector and mixing is not None
        return replace(selection, mixing=mixing, before_projector=mixes_inputs, order=order)

    def mask(self, image: EncodedImage) -> Tensor:
        """Return only the mask of kept tokens, bool `[tiles, tokens]`, as one graph of static shape.

        Keeps the same tokens as `select`, without checks, and reads nothing from the device. For
        ``torch.compile(reducer.mask, fullgraph=True)`` and CUDA graphs.

        Args:
            image: the encoded image. Before a graph is captured, call `mask` once for the same layout and device, which
                copies the index tables of the layout to the device.

        Raises:
            ValueError: if a component cannot be part of one graph, or newline tokens are counted. A selection that
                picks tile by tile, such as that of DivPrune, also requires an allocation that divides on the host, such
                as `UniformAllocation`; with others it reads the budgets.
        """
        is_exact = self.allocation.is_exact and self.selection.is_exact and self.merging is None and self.order is None
        if not is_exact or as_budget(self.budget).newlines == "counted":
            raise ValueError(
                f"{self!r} is no single graph: it needs a selection and an allocation with the property is_exact, no "
                "merging, no order, and free newlines; use select"
            )
        if torch.compiler.is_compiling():
            return self.select(image).kept
        with defer_checks():
            return self.select(image).kept

    def _count_kept(self, selection: Selection, layout: TileGeometry) -> int | None:
        """Return the number of kept tokens if it follows from the budget alone; None if the mask must be counted.

        Args:
            selection: the kept tokens and the budgets of the tiles.
            layout: the layout in which tokens are selected.
        """
        is_exact = self.allocation.is_exact and self.selection.is_exact
        is_exact = is_exact and (self.merging is None or self.merging.is_exact)
        has_padding = self.padding == "ignore" and layout.valid_tokens < layout.tiles * layout.tokens
        is_counted = as_budget(self.budget).newlines == "counted"
        if has_padding or is_counted or not is_exact:
            return None
        return min(selection.asked, layout.valid_tokens)

    def _find_candidates(self, valid: Tensor) -> Tensor:
        """Return the tokens that the selection may keep, bool `[tiles, tokens]`."""
        return torch.ones_like(valid) if self.padding == "ignore" else valid

    def _pick(
        self, image: EncodedImage, scores: Tensor, budgets: Tensor, candidates: Tensor, keeps_all: bool
    ) -> tuple[Tensor, Merged | None]:
        """Return the kept tokens, bool `[tiles, tokens]`, and the result of merging; None if nothing is merged."""

        def pick(budgets: Tensor) -> Tensor:
            picked = self.selection.pick(image, scores, budgets, candidates)
            return require_tensor(picked, self.selection, "pick", "[tiles, tokens]", candidates.shape, "bool")

        if self.merging is None:
            return pick(budgets), None
        reserved = self.merging.reserve(budgets, candidates.sum(dim=1))
        reserved = require_tensor(reserved, self.merging, "reserve", "[tiles]", budgets.shape, "real")
        if keeps_all and not bool(reserved.any()):  # no token is dropped and none is reserved
            return pick(budgets), None
        picked = pick(budgets - reserved)
        merged = _require_merged(self.merging.merge(image, scores, picked, reserved, candidates), self.merging, picked)
        return picked | (merged.kind > 0), merged


def _require_merged(merged: Merged, policy: MergingPolicy, picked: Tensor) -> Merged:
    """Return the result of a merging policy if its tensors have the expected shapes.

    Args:
        merged: the result of `merge`.
        policy: the merging policy.
        picked: the tokens that the selection picked, `[tiles, tokens]`.

    Raises:
        TypeError: if the result is no `Merged` of tensors.
        ValueError: if a tensor has another shape.
    """
    if not isinstance(merged, Merged):
        raise TypeError(
            f"{type(policy).__name__}.merge must return Merged(kind, weights), not {describe_value(merged)}"
            f"{locate_method(policy, 'merge')}"
        )
    (tiles, tokens), axes = picked.shape, "[tiles, tokens, sources]"
    require_tensor(merged.kind, policy, "merge", "[tiles, tokens]", picked.shape, "real")
    has_cls = policy.before_projector and isinstance(merged.weights, Tensor) and merged.weights.shape[-1] == tokens + 1
    require_tensor(merged.weights, policy, "merge", axes, (tiles, tokens, tokens + has_cls), "real")
    return merged


def _build_mixing(weights: Tensor, rows: Tensor, flat_index: Tensor, geometry: TileGeometry) -> Tensor:
    """Return the mixing matrix of a selection, `[kept, tokens of all tiles]`, from the weights inside each tile.

    Args:
        weights: weights inside each tile, `[tiles, tokens, sources]`.
        rows: the index (``tile * tokens + token``) of each kept token in packed order, `[kept]`.
        flat_index: the flat index of each token in the image, `[tiles, tokens]`.
        geometry: the layout of the image.
    """
    tiles, tokens = flat_index.shape
    total = geometry.tiles * geometry.tokens
    cls_columns = weights.shape[2] - tokens
    columns = torch.cat([flat_index, total + torch.arange(tiles, device=flat_index.device)[:, None]], dim=1)
    columns = columns[:, : tokens + cls_columns][rows // tokens]
    mixing = weights.new_zeros(len(rows), total + cls_columns * geometry.tiles)
    return mixing.scatter(1, columns, weights.flatten(0, 1)[rows])
