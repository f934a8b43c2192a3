"""A baseline that selects tokens the way HiRED's published code does, on a model without tokenprune's pipeline.

The vision tower runs eagerly and returns all attention maps and all hidden states. The projector runs on every token.
Python loops take the top tokens of each tile, and the LLM receives them as `inputs_embeds`. The published code
(hasanar1f/HiRED, commit 502d6dd) also packs features and merges prompts with boolean masks, which read from the device.
Both are left out here, so the baseline is a lower bound of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapter import Adapter
from tokenprune.budget import Budget, apportion
from tokenprune.geometry import TileGeometry
from tokenprune.models._base.placeholder import PlaceholderAdapter
from tokenprune.strategies.components.allocation import base_tile_coverage

BASE_SHARE = 0.5
"""Share of the budget for the base tile, as in the published code."""


def as_supported(adapter: Adapter) -> PlaceholderAdapter:
    """Return the adapter, if its model can run the baseline.

    Args:
        adapter: the adapter of the model.

    Raises:
        ValueError: if the model cannot run the baseline; the error names the requirements.
    """
    if (
        isinstance(adapter, PlaceholderAdapter)
        and adapter.projects_per_token
        and adapter.has_cls
        and adapter.pooling == 1
        and adapter.post_norm_path is None
        and len(adapter.feature_layers({})) == 1
    ):
        return adapter
    raise ValueError(
        f"the release-like baseline cannot run {adapter.family} with this vision tower: it requires a CLS token, one "
        "feature layer and a projector that maps each patch to one token, as in LLaVA-1.5 and LLaVA-NeXT"
    )


@contextmanager
def eager_attention(tower: Any) -> Iterator[None]:
    """Run a vision tower with eager attention inside the block; only eager attention returns maps.

    Args:
        tower: the vision tower, a transformers model.
    """
    implementation = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(implementation)


def build_inputs_embeds(
    adapter: PlaceholderAdapter,
    inputs: Mapping[str, Any],
    budget: int | float,
    phase: Callable[[str], AbstractContextManager[Any]] | None = None,
) -> dict[str, Tensor]:
    """Encode images, select tokens, and return the inputs of the LLM: `inputs_embeds` and `attention_mask`.

    Args:
        adapter: the adapter; its tower is inside `eager_attention`.
        inputs: model inputs with one image per prompt, and images of one size, as those of the benchmark.
        budget: tokens of each image to keep: a share of the encoded tokens as a float, or a number as an int.
        phase: returns a context manager that books the time of its block to a phase; None books nothing.
    """
    phase = phase or nullcontext
    layouts, ids = adapter.layouts(inputs), inputs["input_ids"]
    images = zip(adapter.split_pixels(inputs, layouts), layouts, strict=True)
    pixels = torch.cat([tiles[: layout.tiles] for tiles, layout in images])
    outputs = adapter.tower(pixels, output_attentions=True, output_hidden_states=True)
    layer = adapter.feature_layer(inputs)
    projected = adapter.projector(outputs.hidden_states[layer + 1][:, 1:])
    with phase("reducer"):
        early, late = (outputs.attentions[index].sum(dim=1)[:, 0, 1:] for index in (0, layer))
        kept = select_top_tokens(early, late, layouts, budget)
    with phase("rewrite"):
        features = projected.split([layout.tiles for layout in layouts])
        visual = torch.stack([tokens.flatten(0, 1)[index] for tokens, index in zip(features, kept, strict=True)])
        starts = (ids == adapter.image_token_id).int().argmax(dim=1).tolist()
        embed, mask = adapter.model.get_input_embeddings(), inputs["attention_mask"]
        embeddings, masks = [], []
        for row, (start, layout) in enumerate(zip(starts, layouts, strict=True)):
            end, tokens = start + len(layout.packed), visual[row].to(embed.weight.dtype)
            embeddings.append(torch.cat([embed(ids[row, :start]), tokens, embed(ids[row, end:])]))
            masks.append(torch.cat([mask[row, :start], mask.new_ones(len(tokens)), mask[row, end:]]))
        return {"inputs_embeds": torch.stack(embeddings), "attention_mask": torch.stack(masks)}


def select_top_tokens(
    early: Tensor, late: Tensor, layouts: Sequence[TileGeometry], budget: int | float
) -> list[Tensor]:
    """Return the flat indices of the kept tokens of each image in packed order, int64 `[kept]`.

    Half of the budget belongs to the base tile. Sub-images share the remaining half by the early attention in their
    stripes of the base tile. Each tile keeps its tokens with the largest late attention. Unlike the published code, the
    budget is spent exactly and on valid tokens only, so that the LLM receives as many tokens as with `HiRED`.

    Args:
        early: CLS attention of the first layer, summed over heads, `[tiles of all images, tokens]`.
        late: CLS attention of the feature layer, summed over heads, `[tiles of all images, tokens]`.
        layouts: the layout of each image.
        budget: tokens of each image to keep: a share of the encoded tokens as a float, or a number as an int.
    """
    tiles = [layout.tiles for layout in layouts]
    base_tiles = [attention[0].float() for attention in early.split(tiles)]
    stripes = [
        base_tile_coverage(layout.to(early.device), "stripe") @ attention if layout.sub_images else attention[:0]
        for layout, attention in zip(layouts, base_tiles, strict=True)
    ]
    contents = iter(torch.cat(stripes).tolist())  # tile budgets are Python numbers, as in the published code
    kept = []
    for layout, scores in zip(layouts, late.split(tiles), strict=True):
        content = [next(contents) for _ in range(layout.sub_images)]
        total = sum(content) or 1.0
        weights = [BASE_SHARE, *((1 - BASE_SHARE) * value / total for value in content)]
        quotas = apportion(Budget(budget).asked(layout), weights, layout.valid_per_tile)
        tables = layout.to(late.device)
        scores = scores.masked_fill(~tables.valid, -torch.inf)
        tokens = torch.cat(
            [scores[tile].topk(quota).indices + tile * layout.tokens for tile, quota in enumerate(quotas)]
        )
        order = tables.token_order
        position = torch.empty(layout.tiles * layout.tokens, dtype=torch.long, device=late.device)
        position[order] = torch.arange(len(order), device=late.device)
        kept.append(order[position[tokens].sort().values])
    return kept
