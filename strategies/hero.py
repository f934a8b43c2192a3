"""HERO: tiles are paid by how like the image and how near the question they are; tiles and base read other layers.

Paper: Li et al., "HERO: Rethinking Visual Token Early Dropping in High-Resolution Large Vision-Language Models",
arXiv 2509.13067. Repository: Lxxx-0327/HERO, commit 41cc334.

The base tile gets its even share R of the tokens, ranked by late CLS attention (tokens that hold global information).
The sub-images share the rest by ``w_k = 0.2 density_k + 0.8 (alpha saliency_k + (1 - alpha) relevance_k)``, with
``density`` the share of valid tokens, ``saliency = softmax_k(cos(cls_k, cls_base) / T_cls)`` of the last layer, and
``relevance = softmax_k(cos(cls_k, question) / T_clip)`` in CLIP's shared space; they are ranked by early CLS attention
(tokens on objects). Attention is softmaxed once more over the tokens of each head, then averaged.

Assumed, since neither the paper as far as it was read nor the published files name them (the code takes them from its
caller): early layers are those at a quarter to a half of the depth, late ones the three that end with the feature
layer, ``alpha = 0.5``, ``T_cls = T_clip = 0.1``. Repaired: the release rounds the base tile's share, that of all
sub-images and each sub-image's part of it down, and gives nothing back; here the budget is spent exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.budget import apportion, ratio_of
from tokenprune.image import EncodedImage, Signal
from tokenprune.layers import LayerChoice
from tokenprune.policies import AllocationPolicy, SelectionPolicy
from tokenprune.reducer import ComponentReducer


@dataclass
class SaliencyRelevanceAllocation(AllocationPolicy):
    """Sub-images are paid by density, likeness to the whole image, and likeness to the question (HERO).

    Args:
        saliency: share of likeness to the image against likeness to the question (alpha); at 1.0 no text is read.
        density: share of the number of valid tokens.
        saliency_temperature: of the softmax over sub-images (T_cls).
        relevance_temperature: of the softmax over sub-images (T_clip).
        layer: layer of the vision tower whose CLS token stands for a tile.
        retention: None divides the budget exactly; a ratio keeps this share of the encoded tokens as the release does,
            rounded down, whatever the budget.
    """

    saliency: float = 0.5
    density: float = 0.2
    saliency_temperature: float = 0.1
    relevance_temperature: float = 0.1
    layer: LayerChoice = -1
    retention: float | None = None

    @property
    def needs(self) -> Sequence[Signal]:
        """CLS tokens, and unless only the image counts, CLS tokens and question in the shared space."""
        text = () if self.saliency == 1.0 else (Signal("aligned_cls", self.layer), Signal("question"))
        return (Signal("cls_features", self.layer), *text)

    def allocate(self, image: EncodedImage, total: int, capacity: Sequence[int], scores: Tensor) -> list[int]:
        """Give the base tile an even share and divide the rest by the weights."""
        tokens, sub_images = image.geometry.tokens, image.geometry.sub_images
        base = min(total if self.retention is None else int(tokens * self.retention), capacity[0])
        if not sub_images:
            return [base]
        cls = F.normalize(image.cls_features(self.layer)[:, 0], dim=-1)
        salient = (cls[1:] @ cls[0] / self.saliency_temperature).softmax(dim=0)
        weights = self.saliency * salient
        if self.saliency < 1.0:
            tiles = F.normalize(image.aligned_cls(self.layer)[1:, 0], dim=-1)
            near = (tiles @ F.normalize(image.question(), dim=-1).T).mean(dim=-1)
            weights = weights + (1 - self.saliency) * (near / self.relevance_temperature).softmax(dim=0)
        room = torch.tensor(capacity[1:], dtype=weights.dtype, device=weights.device)
        if self.retention is not None:
            dense = room / tokens
            dense = dense / (dense.sum() + 1e-6)  # in float32 like the rest, since it decides what is rounded down
            parts = (self.density * dense + (1 - self.density) * weights) * int(sub_images * tokens * self.retention)
            return [base, *(min(int(part), most) for part, most in zip(parts.tolist(), capacity[1:], strict=True))]
        weights = self.density * room / room.sum().clamp(min=1) + (1 - self.density) * weights
        weights = weights / weights.sum().clamp(min=1e-12)
        return apportion(total, [1.0, *(weights * sub_images).tolist()], capacity)


def _sharpened(image: EncodedImage, layer: LayerChoice) -> Tensor:
    layers = layer if isinstance(layer, list) else [layer]
    maps = [image.cls_attention(one).softmax(dim=-1).mean(dim=1) for one in layers]  # type: ignore[arg-type]
    return torch.stack(maps).mean(dim=0)


@dataclass
class EarlyLateAttentionSelection(SelectionPolicy):
    """Rank sub-images by early CLS attention and the base tile by late CLS attention (HERO).

    Args:
        early: layers read for sub-images.
        late: layers read for the base tile.
    """

    early: LayerChoice = field(default_factory=lambda: [0.25, 0.375, 0.5])
    late: LayerChoice = field(default_factory=lambda: [-4, -3, -2])

    @property
    def needs(self) -> Sequence[Signal]:
        """The CLS attention of both."""
        return (Signal("cls_attention", self.early), Signal("cls_attention", self.late))

    def score(self, image: EncodedImage) -> Tensor:
        """Return CLS attention, softmaxed over the tokens of each head and averaged, `[tiles, tokens]`."""
        return torch.cat([_sharpened(image, self.late)[:1], _sharpened(image, self.early)[1:]])


@dataclass
class HERO(ComponentReducer):
    """Tiles paid by likeness to image and question, ranked by early (base tile: late) CLS attention.

    The budget is spent exactly; see the module for what was assumed.
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
        """Return HERO as published in code: a retention ratio, rounded down throughout, all newlines on top.

        The release takes all of these from its caller; the defaults are assumed as in `HERO`. Where an odd number of
        rows (columns) is padding, it counts one row less as valid than the model, and it puts a newline after rows of
        padding too; here both follow the model's own unpadding. It runs in half precision, where the second softmax
        leaves only some thirty different scores a tile; here as in float32.

        Args:
            retention: share of the tokens to keep (R), as a number or a text such as ``"20%"``.
            saliency: share of likeness to the image against likeness to the question (alpha).
            saliency_temperature: of the softmax over sub-images (T_cls).
            relevance_temperature: of the softmax over sub-images (T_clip).
            early: layers read for sub-images.
            late: layers read for the base tile.
            text_model: the CLIP checkpoint that the vision tower comes from.
        """
        ratio = ratio_of(retention)
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
