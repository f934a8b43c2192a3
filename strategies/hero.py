"""HERO: the budget of a tile grows with its similarity to the image and to the question.

Paper: Li et al., "HERO: Rethinking Visual Token Early Dropping in High-Resolution Large Vision-Language Models",
arXiv 2509.13067. Repository: Lxxx-0327/HERO, commit 41cc334.

The base tile keeps its even share R of the tokens, ranked by late CLS attention (tokens with global information). The
sub-images share the remaining budget by ``w_k = 0.2 density_k + 0.8 (alpha saliency_k + (1 - alpha) relevance_k)``:

* ``density`` is the share of valid tokens.
* ``saliency = softmax_k(cos(cls_k, cls_base) / T_cls)`` uses the last layer.
* ``relevance = softmax_k(cos(cls_k, question) / T_clip)`` uses the shared embedding space of CLIP.

Tokens of sub-images are ranked by early CLS attention (tokens on objects). The attention passes a second softmax over
the tokens of each head and is then averaged over heads.

Assumptions, since neither the parts of the paper that were read nor the published files specify these values (the code
reads them from its caller): early layers are at a quarter to a half of the depth, late layers are the last three up to
the feature layer, ``alpha = 0.5``, ``T_cls = T_clip = 0.1``. Repaired: the release rounds down three values (the share
of the base tile, the share of all sub-images, and the share of each sub-image) and redistributes nothing. Here the
budget is spent exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.budget import apportion_tensor, as_device_tensor, parse_ratio
from tokenprune.component_reducer import ComponentReducer
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import AllocationPolicy, SelectionPolicy


@dataclass
class SaliencyRelevanceAllocation(AllocationPolicy):
    """Divides the budget by the density of sub-images and by their similarity to the image and to the question (HERO).

    Args:
        saliency: weight of the similarity to the image (alpha); the similarity to the question has the weight
            ``1 - alpha``. At 1.0 no text is read.
        density: weight of the number of valid tokens.
        saliency_temperature: temperature of the softmax of the image similarity over sub-images (T_cls).
        relevance_temperature: temperature of the softmax of the question similarity over sub-images (T_clip).
        layer: layer of the vision tower whose CLS token represents a tile.
        retention: None divides the budget exactly. A ratio keeps this share of the encoded tokens, rounded down, and
            ignores the budget, as the release does.
    """

    saliency: float = 0.5
    density: float = 0.2
    saliency_temperature: float = 0.1
    relevance_temperature: float = 0.1
    layer: LayerChoice = -1
    retention: float | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the budget is spent in full."""
        return self.retention is None

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS tokens; unless ``saliency`` is 1.0, also CLS tokens and question in the shared embedding space."""
        text = () if self.saliency == 1.0 else (Signal("aligned_cls", self.layer), Signal("question"))
        return (Signal("cls_features", self.layer), *text)

    def allocate(
        self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor
    ) -> Sequence[int] | Tensor:
        """Grant the base tile an even share, and divide the remaining budget by the weights."""
        tokens, sub_images = image.geometry.tokens, image.geometry.sub_images
        base = min(total if self.retention is None else int(tokens * self.retention), capacity[0])
        if not sub_images:
            return [base]
        cls = F.normalize(image.cls_features(self.layer)[:, 0], dim=-1)
        saliency = (cls[1:] @ cls[0] / self.saliency_temperature).softmax(dim=0)
        weights = self.saliency * saliency
        if self.saliency < 1.0:
            tiles = F.normalize(image.aligned_cls(self.layer)[1:, 0], dim=-1)
            similarity = (tiles @ F.normalize(image.question(), dim=-1).T).mean(dim=-1)
            weights = weights + (1 - self.saliency) * (similarity / self.relevance_temperature).softmax(dim=0)
        limits = as_device_tensor(tuple(capacity), weights.device)
        densities = limits[1:].to(weights.dtype)
        if self.retention is not None:
            density = densities / tokens
            density = density / (density.sum() + 1e-6)  # float32 as in the release: rounding down depends on it
            shares = (self.density * density + (1 - self.density) * weights) * int(sub_images * tokens * self.retention)
            return torch.cat([limits.new_full((1,), base), shares.long()]).minimum(limits)
        weights = self.density * densities / densities.sum().clamp(min=1) + (1 - self.density) * weights
        weights = weights / weights.sum().clamp(min=1e-12)
        return apportion_tensor(total, torch.cat([weights.new_ones(1), weights * sub_images]), capacity)


def _softmaxed_attention(image: EncodedImage, choice: LayerChoice) -> Tensor:
    layers = choice if isinstance(choice, list) else [choice]
    maps = [image.cls_attention(layer).softmax(dim=-1).mean(dim=1) for layer in layers]  # type: ignore[arg-type]
    return torch.stack(maps).mean(dim=0)


@dataclass
class EarlyLateAttentionSelection(SelectionPolicy):
    """Keeps the tokens with the largest CLS attention, early in sub-images and late in the base tile (HERO).

    Args:
        early: layers of the vision tower that are read for sub-images.
        late: layers of the vision tower that are read for the base tile.
    """

    early: LayerChoice = field(default_factory=lambda: [0.25, 0.375, 0.5])
    late: LayerChoice = field(default_factory=lambda: [-4, -3, -2])

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of the early and of the late layers."""
        return (Signal("cls_attention", self.early), Signal("cls_attention", self.late))

    def score(self, image: EncodedImage) -> Tensor:
        """Return CLS attention after a second softmax, averaged over heads and layers, `[tiles, tokens]`."""
        return torch.cat([_softmaxed_attention(image, self.late)[:1], _softmaxed_attention(image, self.early)[1:]])


@dataclass
class HERO(ComponentReducer):
    """Divides the budget by similarity of tiles to image and question, and ranks tokens by early or late CLS attention.

    The budget is spent exactly. The module docstring lists the assumptions.
    """

    published: ClassVar[str] = "arXiv 2509.13067"
    parity: ClassVar[str] = "release(): 6/6 transcribed cases"

    allocation: AllocationPolicy = field(default_factory=SaliencyRelevanceAllocation, kw_only=True)
    selection: SelectionPolicy = field(default_factory=EarlyLateAttentionSelection, kw_only=True)

    @classmethod
    def release(
        cls,
        retention: float | str = 0.2,
        saliency: float = 0.5,
        saliency_temperature: float = 0.1,
        relevance_temperature: float = 0.1,
        early: LayerChoice | None = None,
        late: LayerChoice | None = None,
        text_model: str | None = None,
    ) -> HERO:
        """Return HERO as published in code: a retention ratio, rounded down, plus all newline tokens.

        The release reads all parameters from its caller. The defaults are the assumptions of `HERO`. If the number of
        padding rows (columns) is odd, the release counts one valid row fewer than the model. It also inserts newline
        tokens after padding rows. Here both follow the unpadding of the model. The release runs in half precision,
        where the second softmax yields only about thirty different scores per tile. Here it is computed in float32.

        Args:
            retention: share of the tokens to keep (R), as a number or a string such as ``"20%"``.
            saliency: weight of the similarity to the image (alpha), against the similarity to the question.
            saliency_temperature: temperature of the softmax of the image similarity over sub-images (T_cls).
            relevance_temperature: temperature of the softmax of the question similarity over sub-images (T_clip).
            early: layers of the vision tower that are read for sub-images.
            late: layers of the vision tower that are read for the base tile.
            text_model: CLIP checkpoint of the vision tower.
        """
        ratio = parse_ratio(retention)
        allocation = SaliencyRelevanceAllocation(
            saliency,
            saliency_temperature=saliency_temperature,
            relevance_temperature=relevance_temperature,
            retention=ratio,
        )
        layers = {name: value for name, value in (("early", early), ("late", late)) if value is not None}
        return cls(
            ratio,
            newlines="keep",
            text_model=text_model,
            allocation=allocation,
            selection=EarlyLateAttentionSelection(**layers),
        )
