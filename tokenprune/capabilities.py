"""Optional methods of adapters, as classes from which an adapter inherits if its model supports them.

`Adapter.provides` names the signals of one model. Each class names the signals that require it. Callers check for
a capability with `require_capability`:

>>> require_capability(adapter, ReadsQuestion).embed_question("what is in the image", "mini")
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from tokenprune.geometry import TileGeometry

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter, Encoding
    from tokenprune.compiled import CompiledLLM, CompileOptions

C = TypeVar("C")


class ReadsQuestion(ABC):
    """Reads the questions of prompts and embeds them; required by the signals of the question (`TEXT_SIGNALS`)."""

    @abstractmethod
    def embed_question(self, text: str, text_model: str | None) -> Mapping[str, Tensor]:
        """Return the signals of a question by kind.

        Args:
            text: the question.
            text_model: the CLIP checkpoint with the text tower.
        """

    @abstractmethod
    def read_questions(self, input_ids: Tensor, attention_mask: Tensor | None, tokenizer: Any = None) -> list[str]:
        """Return the question of each prompt row: the text of the last user turn, without template and images.

        Args:
            input_ids: prompts, `[rows, length]`.
            attention_mask: real positions, `[rows, length]`.
            tokenizer: decodes the ids; by default the tokenizer of the model's own folder or hub id.
        """


class Resizable(ABC):
    """Encodes images at a lower resolution; required by the signal ``"resolution"``."""

    @abstractmethod
    def encode_resized(self, inputs: Mapping[str, Any], grids: Sequence[tuple[int, int] | None]) -> list[Tensor]:
        """Return the visual tokens of each image encoded at a lower resolution, `[length, dim]` each.

        Args:
            inputs: the vision inputs of a call.
            grids: for each image, height x width of the tokens of a tile; None skips the image.
        """

    @abstractmethod
    def build_unencoded(self, inputs: Mapping[str, Any], keep_pixels: int = 0) -> Encoding:
        """Return an encoding with layouts and without features; the vision tower does not run.

        Args:
            inputs: the model inputs of the call.
            keep_pixels: number of images that keep their pixels for drawing.
        """


class ShowsTiles(ABC):
    """Returns the pixels of images; required by a saliency model (`SaliencyModel`)."""

    @abstractmethod
    def read_tiles(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Return the pixels of each image as the model receives them, `[tiles, 3, height, width]`, base tile first.

        Args:
            inputs: the vision inputs of a call.
            layouts: the layouts of its images.
        """

    @abstractmethod
    def pixel_mean_std(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return the mean and standard deviation per color channel that the processor normalizes images with."""


class ProjectsMixtures(ABC):
    """Projects weighted sums of features; required by the signal ``"projector_inputs"``."""

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """Return the projector's output for weighted sums of its inputs, `[kept, width]` to `[kept, dim]`."""


class Compilable(ABC):
    """Runs the vision tower and the language model as compiled graphs; required by ``compile=True``."""

    @abstractmethod
    def compile_parts(self, options: CompileOptions, multiple: int) -> CompiledLLM:
        """Return the compiled language model, and encode images with a compiled tower from now on.

        Args:
            options: the compiler.
            multiple: number of which the width of a compiled prefill is a multiple.

        Raises:
            ValueError: if a part of the model cannot be compiled.
        """


def require_capability(adapter: Adapter, capability: type[C]) -> C:
    """Return the adapter as an instance of a capability, or raise an error.

    Args:
        adapter: the adapter of a model.
        capability: a class of this module.

    Raises:
        TypeError: if the adapter does not inherit from the class.
    """
    if not isinstance(adapter, capability):
        purpose = (inspect.getdoc(capability) or "").split("\n")[0].rstrip(".")
        raise TypeError(
            f"{type(adapter).__name__} has no capability {capability.__name__} ({purpose}); an adapter with this "
            f"capability inherits from tokenprune.capabilities.{capability.__name__}"
        )
    return adapter
