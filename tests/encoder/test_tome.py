"""ToMe equals recorded cases of the official code, and a vision tower in which it is written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.encoder import encode_reduced, load
from tokenprune.adapter import find_adapter
from tokenprune.budget import UnreachableBudgetWarning
from tokenprune.encoder.matching import match_bipartite
from tokenprune.encoder.patches import PatchGroups, merge_groups
from tokenprune.image import Signal
from tokenprune.strategies.encoder import ToMe

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "tome.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN})


@pytest.mark.parametrize("case", CASES)
def test_groups_equal_the_official_code(case: str) -> None:
    values = {
        name: GOLDEN[f"{case}/{name}"] for name in ("metric", "tokens", "sizes", "group", "merged", "merged_sizes")
    }
    has_cls = bool(GOLDEN[f"{case}/class_token"])
    first = int(has_cls)
    metric, tokens, sizes = (torch.tensor(values[name]).float()[None] for name in ("metric", "tokens", "sizes"))
    groups = match_bipartite(metric[:, first:], int(GOLDEN[f"{case}/r"]), has_cls)
    merged, merged_sizes = merge_groups(tokens[:, first:], groups, sizes[:, first:])
    assert groups.group is not None
    assert [0] * first + (groups.group[0] + first).tolist() == values["group"].tolist()
    np.testing.assert_allclose(torch.cat([tokens[:, :first], merged], 1)[0], values["merged"], rtol=1e-6, atol=1e-6)
    assert sizes[0, :first].tolist() + merged_sizes[0].tolist() == values["merged_sizes"].tolist()


def merge_one_tile(metric: Tensor, states: Tensor, sizes: list[float], members: list[list[int]], r: int) -> Any:
    """Return states, sizes and members after bipartite matching of one sequence that begins with a CLS token."""
    directions = metric / metric.norm(dim=-1, keepdim=True)
    set_a, set_b = list(range(0, len(states), 2)), list(range(1, len(states), 2))
    nearest = {a: max(set_b, key=lambda b: float(directions[a] @ directions[b])) for a in set_a[1:]}
    by_similarity = sorted(nearest, key=lambda a: -float(directions[a] @ directions[nearest[a]]))
    sources = by_similarity[: min(r, (len(states) - 1) // 2)]
    order = [a for a in set_a if a not in sources] + set_b
    groups = {b: [b, *(a for a in sources if nearest[a] == b)] for b in set_b}
    groups |= {a: [a] for a in set_a if a not in sources}
    new_states = torch.stack(
        [sum(states[m] * sizes[m] for m in groups[i]) / sum(sizes[m] for m in groups[i]) for i in order]  # type: ignore[misc]
    )
    new_sizes = [sum(sizes[m] for m in groups[i]) for i in order]
    return new_states, new_sizes, [[p for m in groups[i] for p in members[m]] for i in order]


def run_written_out(tower: Any, pixels: Tensor, r: int, layers: int, proportional: bool) -> tuple[Tensor, Tensor]:
    """Return the states of the patches after the last layer, and the CLS attention in this layer, by patch.

    Every patch of a group has the state of the group and the attention of the group.
    """
    states = tower.pre_layrnorm(tower.embeddings(pixels))
    outputs, rows = [], []
    for tile in states:
        sizes, members = [1.0] * len(tile), [[position] for position in range(len(tile))]
        for layer in tower.encoder.layers[:layers]:
            attention, normed = layer.self_attn, layer.layer_norm1(tile)
            heads = (len(tile), attention.num_heads, attention.head_dim)
            query, key, value = (
                module(normed).view(heads).transpose(0, 1)
                for module in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            logits = query @ key.transpose(1, 2) * attention.head_dim**-0.5
            logits = logits + torch.tensor(sizes, dtype=tile.dtype).log() if proportional else logits
            weights = logits.softmax(dim=-1)
            tile = tile + attention.out_proj((weights @ value).transpose(0, 1).reshape(len(tile), -1))
            row, row_members = weights[:, 0], members
            tile, sizes, members = merge_one_tile(key.mean(dim=0), tile, sizes, members, r)
            tile = tile + layer.mlp(layer.layer_norm2(tile))
        full = torch.zeros(states.shape[1:], dtype=tile.dtype)
        attended = torch.zeros(len(row), states.shape[1], dtype=tile.dtype)
        for entry, positions in enumerate(members):
            full[positions] = tile[entry]
        for entry, positions in enumerate(row_members):
            attended[:, positions] = row[:, entry, None]
        outputs.append(full[1:])
        rows.append(attended[:, 1:])
    return torch.stack(outputs), torch.stack(rows)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("r", [1, 4])
def test_tower_equals_the_written_out_tower(r: int, kernel: str, proportional: bool) -> None:
    model, inputs = load("llava")
    adapter: Any = find_adapter(model)
    layer, reducer = adapter.feature_layer(inputs), ToMe(r=r, proportional=proportional)
    needs = [Signal("vision_features"), Signal("cls_attention")]
    model.set_attn_implementation(kernel)
    try:
        encoding, reduction = encode_reduced(model, inputs, reducer, needs)
        with torch.no_grad():
            states, rows = run_written_out(adapter.tower, inputs["pixel_values"], r, layer + 1, proportional)
    finally:
        model.set_attn_implementation("sdpa")
    tolerance = 1e-9 if kernel == "sdpa" else 1e-5  # the eager kernel computes its softmax in float32
    features = torch.cat([image.signals["vision_features", layer] for image in encoding.images])
    torch.testing.assert_close(features, states, rtol=0, atol=tolerance * float(states.abs().max()))
    attention = torch.cat([image.signals["cls_attention", layer] for image in encoding.images]).double()
    present = reduction.inputs[layer][0].mask[:, None]
    torch.testing.assert_close(attention, rows * present, rtol=0, atol=2e-5)  # rows are float32
    assert present.sum(dim=-1).unique().tolist() == [reducer.list_steps(16, layer + 1)[layer - 1]]


def test_merged_patches_keep_the_sum_of_their_sizes() -> None:
    metric = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    groups = match_bipartite(metric, 7, has_cls=True)
    _, sizes = merge_groups(metric, groups, None)
    assert sizes.shape == (3, 13)
    assert sizes.sum(dim=1).tolist() == [20.0] * 3


def test_weights_replace_the_mean() -> None:
    groups = PatchGroups(torch.tensor([[0]]), torch.tensor([[0, 0, -1]]), torch.tensor([[1.0, 0.5, 9.0]]))
    merged, sizes = merge_groups(torch.tensor([[[2.0], [4.0], [8.0]]]), groups, None)
    assert merged.tolist() == [[[4.0]]]
    assert sizes.tolist() == [[2.0]]


def test_a_budget_that_merging_cannot_reach_warns(recwarn: pytest.WarningsRecorder) -> None:
    assert ToMe(0.25).list_steps(100, 4)[3] == 25
    assert ToMe(r=80).list_steps(100, 2) == {0: 50, 1: 25}
    assert not recwarn
    with pytest.warns(UnreachableBudgetWarning, match=r"leaves 28 of 100 patches of a tile, not 10: .* 2 layers run"):
        assert ToMe(0.1).list_steps(100, 2) == {0: 55, 1: 28}
