"""QuestionFirst: anchors come first, up to their share; the other tokens follow by two ranks of saliency."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage
from tokenprune.policies import RelevancePolicy
from tokenprune.strategies import QuestionFirst
from tokenprune.strategies.components.relevance import AttentionRelevance, MeanRelevance
from tokenprune.strategies.question_first import QuestionFirstSelection
from tokenprune.testing.encoded_images import random_encoded_image

GEOMETRY = TileGeometry.anyres((90, 160), (1, 2), (10, 10), 80)


class Spikes(RelevancePolicy):
    """A relevance of 0, and of 5, 6, 7, ... at some tokens of the pool."""

    spikes = (3, 50, 51, 120, 130)

    def relevance(self, image: EncodedImage) -> Tensor:
        values = torch.zeros(image.geometry.tiles, image.geometry.tokens)
        values[0, list(self.spikes)] = 5.0 + torch.arange(len(self.spikes))
        return values


def make_reducer(budget: float | int | Budget, **options: float) -> QuestionFirst:
    return QuestionFirst(budget, selection=QuestionFirstSelection(relevance=Spikes(), **options))


def list_kept(reducer: QuestionFirst, image: EncodedImage) -> list[int]:
    """Return the indices of the kept tokens in the pool of all tiles."""
    geometry = image.geometry
    return reducer.reduce(image).kept.flatten()[geometry.token_order].nonzero()[:, 0].tolist()


def list_salient(image: EncodedImage) -> list[int]:
    """Return the tokens of the pool by the sum of two ranks, the largest first; written as loops."""
    flat = image.flatten_tiles()
    signals = [policy.relevance(flat)[0].tolist() for policy in (AttentionRelevance(), MeanRelevance())]
    places = [sorted(range(len(values)), key=values.__getitem__) for values in signals]
    ranks = [sum(order.index(token) for order in places) for token in range(len(signals[0]))]
    return sorted(range(len(ranks)), key=lambda token: -ranks[token])


@pytest.fixture
def image() -> EncodedImage:
    return random_encoded_image(GEOMETRY, 0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_anchors_get_at_most_their_share(image: EncodedImage, share: float) -> None:
    number, salient = 8, list_salient(image)
    anchors = sorted(Spikes.spikes, reverse=True)[: int(share * number)]  # the last spikes are the most relevant
    expected = {*anchors, *[token for token in salient if token not in anchors][: number - len(anchors)]}
    assert set(list_kept(make_reducer(number, share=share), image)) == expected


def test_a_high_threshold_leaves_only_saliency(image: EncodedImage) -> None:
    assert set(list_kept(make_reducer(12, threshold=1e6), image)) == set(list_salient(image)[:12])


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share=.* must be from 0.0 to 1.0"):
        QuestionFirstSelection(share=share)


@pytest.mark.parametrize("number", [0, 1, 7, GEOMETRY.valid_tokens])
def test_the_budget_is_spent_exactly(image: EncodedImage, number: int) -> None:
    assert len(list_kept(make_reducer(number), image)) == number
