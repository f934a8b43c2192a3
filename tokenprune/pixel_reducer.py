"""The base class of strategies that drop tokens by their pixels, before the vision tower."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from tokenprune.budget import Budget, as_budget
from tokenprune.image import EncodedImage, Signal
from tokenprune.reducer import TokenReducer
from tokenprune.selection import Selection, top_of_image
from tokenprune.stages import PixelStage, Stage


@dataclass
class PixelReducer(TokenReducer):
    """A strategy that drops tokens by their pixels: the vision tower runs on the patches of the kept tokens only.

    `error` receives an image whose `features` are the pixels of each token, `[tiles, tokens, 3 * height * width]`. A
    token is kept if its error exceeds the threshold, so that the number of kept tokens depends on the image. It is read
    from the device once per call. If more tokens exceed the threshold than the budget grants, the tokens with the
    largest errors are kept.

    Args:
        budget: upper limit of the kept tokens.
        positions: as in `TokenReducer`; by default kept tokens have the position ids of the full prompt.
        threshold: largest error of a dropped token. Pixels range from 0 to 1.
        image_std: standard deviation of the colors with which the image processor normalizes pixels. None reads it from
            the processor in the folder of the model, if the threshold is not 0.
    """

    stage: ClassVar[Stage] = PixelStage()
    exact: ClassVar[bool] = False

    budget: int | float | str | Budget = 1.0
    positions: Literal["reindex", "preserve"] = "preserve"
    threshold: float = field(default=0.0, kw_only=True)
    image_std: tuple[float, float, float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the threshold.

        Raises:
            ValueError: if the threshold is negative.
        """
        super().__post_init__()
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold!r} is no difference of pixels; write a number from 0.0 to 1.0")

    @property
    def needs(self) -> Sequence[Signal]:
        """The signal ``"patch_removal"``: requires a vision tower that runs on a part of the patches of an image."""
        return (Signal("patch_removal"),)

    @abstractmethod
    def error(self, image: EncodedImage) -> Tensor:
        """Return the difference of each token from its prediction, `[tiles, tokens]`; infinite without a prediction."""

    def select(self, image: EncodedImage) -> Selection:
        """Return the tokens whose error exceeds the threshold, at most the budget."""
        geometry = image.geometry.to(image.device)
        error, asked = self.error(image), as_budget(self.budget).asked(geometry)
        kept = top_of_image(error, asked, geometry.valid & (error > self.threshold))
        return Selection(image.geometry, kept, asked, scores=error)
