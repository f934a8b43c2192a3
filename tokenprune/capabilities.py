"""Optional methods of adapters, as classes from which an adapter inherits if its model supports them.

`Adapter.provides` names the signals of one model. Each class names the signals that require it. Callers check for
a capability with `require_capability`:

>>> require_capability(adapter, ReadsQuestion).embed_question("what is in the image", "mini")
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor, nn

from tokenprune.geometry import TileGeometry

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter, Encoding
    from tokenprune.compiled import CompiledLLM, CompileOptions
    from tokenprune.decoder.trace import LayerTrace

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


@dataclass(frozen=True, eq=False)
class DecoderModules:
    """The modules of an LLM, for reduction inside it.

    Args:
        decoder: the module whose `forward` runs the decoder layers.
        layers: the decoder layers.
        attention: name of the attention module in a layer; layers without attention lack it.
        mlp: name of the MLP in a layer.
        rotary: the module that computes position embeddings; None if there is none.
        norm: the norm after the last layer; None if there is none.
        count_weights: returns the number of weights of the linear maps of a module, in any storage format.
        adds_features_until: number of first layers before which the model adds features by prompt position; hidden
            states keep the width of the prompt there.
    """

    decoder: nn.Module
    layers: Sequence[nn.Module]
    count_weights: Callable[[nn.Module], int]
    attention: str = "self_attn"
    mlp: str = "mlp"
    rotary: nn.Module | None = None
    norm: nn.Module | None = None
    adds_features_until: int = 0

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with attention."""
        return tuple(i for i, layer in enumerate(self.layers) if getattr(layer, self.attention, None) is not None)

    def layer_before(self, cut: int) -> int:
        """Return the index of the deepest layer with attention before a cut.

        Raises:
            ValueError: if no layer before the cut has attention.
        """
        before = [index for index in self.attention_layers if index < cut]
        if not before:
            raise ValueError(f"no layer before layer {cut} of the LLM has attention; set a later cut")
        return before[-1]


class LayerTracer(Protocol):
    """Traces decoder layers in a prefill."""

    def hold(self) -> AbstractContextManager[None]:
        """Return a context that keeps the hooks on the traced layers; they run after hooks that were placed before."""

    def record_into(self, store: MutableMapping[int, LayerTrace]) -> AbstractContextManager[None]:
        """Return a context in which the traced layers of this thread are recorded, each layer once.

        Args:
            store: receives the trace of each layer by layer index.
        """


class HasDecoder(ABC):
    """Gives access to the layers of the LLM; required by strategies that act inside the LLM.

    An adapter that inherits from `TowerAdapter` implements it with class attributes.
    """

    @property
    @abstractmethod
    def decoder_modules(self) -> DecoderModules:
        """The modules of the LLM."""

    @abstractmethod
    def trace_layers(self, kinds_by_layer: Mapping[int, frozenset[str]]) -> LayerTracer:
        """Return a tracer of layers.

        Args:
            kinds_by_layer: kinds of signals by layer index; kinds of `ASKED_SIGNALS` come from `ask_layer`.

        Raises:
            ValueError: if a layer without attention is traced for a signal of attention.
        """

    @abstractmethod
    def ask_layer(
        self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], rotated: bool = True
    ) -> LayerTrace:
        """Return the queries and keys that a layer would compute on its inputs; its cache does not change.

        Args:
            index: index of the layer.
            args: positional inputs of the layer.
            kwargs: keyword inputs of the layer.
            rotated: whether position embeddings are applied.

        Raises:
            ValueError: if the layer has no attention.
        """


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
