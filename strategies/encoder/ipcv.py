"""IPCV: drops the patches that a layer of the vision tower changed least, and restores them afterwards.

Paper: Chen et al., "IPCV: Information-Preserving Compression for MLLM Visual Encoders", arXiv 2512.18747. Repository:
Perkzi/IPCV, commit 29726f0 (`IPCV_ViT`).

``score = norm(input of layer 3 - input of layer 2)``. Layers from 3 on run on the 35 % of the patches with the largest
scores. The state of a dropped patch is ``its state before layer 3 + mean change of its 10 nearest kept patches since
then`` (nearest before layer 3, Euclidean). In the first 7 of these layers, attention runs on all patches with these
states, and the MLP on the kept ones. After the last layer, all patches enter the projector.

Differences from the release: an image keeps 35 % of its own patches and finds neighbors among them. The release
selects among the patches of all images of a call (Qwen2-VL), and searches neighbors in all tiles of a call, CLS tokens
included (InternVL2). Features that the model reads from earlier layers (Qwen3-VL) also contain restored patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from tokenprune.encoder.patches import PatchGroups
from tokenprune.encoder.restoration import nearest_kept
from tokenprune.encoder_reducer import PatchDropReducer
from tokenprune.image import EncodedImage, Signal


@dataclass
class IPCV(PatchDropReducer):
    """Drops the patches that a layer of the vision tower changed least, and restores them afterwards.

    All visual tokens enter the LLM. The default depth is layer 3 of towers with 24 and 32 layers.

    Args:
        neighbors: number of kept patches from which a dropped patch is restored.
        attended_layers: number of layers from the step on whose attention runs on all patches.
    """

    published: ClassVar[str] = "arXiv 2512.18747"
    parity: ClassVar[str] = "group and restored states: 6/6 official cases"
    acts: ClassVar[Literal["inside", "before"]] = "before"

    schedule: tuple[tuple[int | float, int | float], ...] = field(default=((0.11, 0.35),), kw_only=True)
    neighbors: int = field(default=10, kw_only=True)
    attended_layers: int = field(default=7, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: if the schedule has several steps, or a number is out of range.
        """
        super().__post_init__()
        if len(self.schedule) > 1:
            raise ValueError(f"IPCV drops patches at one layer, but the schedule {self.schedule} has several; pass one")
        if self.neighbors < 1 or self.attended_layers < 0:
            raise ValueError(
                f"neighbors={self.neighbors} and attended_layers={self.attended_layers} must be at least 1 and 0"
            )

    @property
    def needs(self) -> Sequence[Signal]:
        """The change of the hidden states in the layer before the step."""
        return (Signal("state_change"),)

    @property
    def full_attention_layers(self) -> int:
        """The option `attended_layers`."""
        return self.attended_layers

    def score(self, image: EncodedImage) -> Tensor:
        """Return the norm of the change of each patch in the layer before the step, `[tiles, patches]`."""
        return image.state_change("feature").norm(dim=-1)

    def group(self, image: EncodedImage, number: int) -> PatchGroups:
        """Return the patches with the largest changes, and the nearest of them for each dropped patch."""
        groups = super().group(image, number)
        return groups._replace(neighbors=nearest_kept(image.features, groups.kept, self.neighbors))
