"""What makes one model family speak tokenprune's words. Concrete adapters live in `tokenprune.models`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.image import EncodedImage, Signal, TileGeometry
from tokenprune.registry import collect
from tokenprune.rewrite import TextSeparatorSide, counted_positions

ADAPTERS = "tokenprune.models"
"""Where adapters live, and the entry point group of plug-ins."""


@dataclass(frozen=True)
class LLMShape:
    """The numbers of a decoder that cost accounting needs.

    Args:
        layers: number of decoder layers.
        heads: query heads per layer.
        kv_heads: key and value heads per layer.
        head_dim: width of a head.
        linear_parameters: weights of all linear maps in the decoder layers together (biases left out).
        head_parameters: weights of the language model head.
        element_bytes: bytes of one cached number.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    linear_parameters: int
    head_parameters: int
    element_bytes: int


@dataclass(frozen=True, eq=False)
class Encoding:
    """The encoded images of one call, in the order of their places in the prompt.

    Args:
        images: what strategies see.
        packed: each image as the model would feed it to the LLM, newlines included, `[length, dim]` each.
        outputs: the model's own output object, for `Adapter.hand_over`.
        inputs: the vision inputs that were encoded, for encoding them anew.
        videos: the model's own output object of videos in the same call, if there are any; they are never reduced.
    """

    images: list[EncodedImage]
    packed: list[Tensor]
    outputs: Any
    inputs: Mapping[str, Any] = field(default_factory=dict)
    videos: Any = None

    staged: ClassVar[bool] = False
    """Whether tiles can still be left out."""

    def base_tiles(self) -> list[EncodedImage]:
        """Return the images as far as their base tiles alone show them; `leave_out` comes next.

        Signals of other tiles may be zero, and features may be missing.
        """
        return self.images

    def leave_out(self, paid: Sequence[Tensor | None]) -> None:
        """Spend no more on tiles of which nothing can stay, if that is still possible.

        Args:
            paid: for each image which of its tiles can keep tokens, base tile first, bool `[tiles]`; None is all.
        """

    def kept(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return what stays of each image, `[kept, dim]` each.

        Args:
            masks: which packed positions stay, bool `[length]` each.
        """
        return taken(self.packed, masks)

    def repeated(self, times: int) -> Encoding:
        """Return the encoding of the same images again and again, for several questions about them."""
        return Encoding(self.images * times, self.packed * times, self.outputs, self.inputs)


def taken(packed: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """Return what stays of images as they would enter the LLM, `[kept, dim]` each."""
    return [features[mask.to(features.device)] for features, mask in zip(packed, masks, strict=True)]


class Adapter(ABC):
    """One supported model family, bound to one live model. It knows nothing about methods.

    Args:
        model: a model for which `matches` is true.
    """

    family: ClassVar[str]
    """Name of the family as transformers calls it (`config.model_type`)."""

    model_class: ClassVar[str]
    """Name of the transformers class."""

    pixels: ClassVar[str] = "pixel_values"
    """Name of the model input that holds the pictures; a call without it has none."""

    broken_with: ClassVar[frozenset[str]] = frozenset()
    """Versions of transformers whose own model of this family raises; nothing can be attached to it there."""

    in_prompt: ClassVar[bool] = True
    """Whether visual tokens stand in the prompt; else the LLM attends to them from outside, and it stays as it is."""

    vision_positions: ClassVar[bool] = False
    """Whether the model makes position ids from its vision inputs (M-RoPE): they are then handed over, too."""

    text_separator_side: ClassVar[TextSeparatorSide] = "none"
    """Where text inside the span of an image belongs, if there is any that separates rows or tiles."""

    beams: ClassVar[bool] = True
    """Whether the unmodified model generates with beams from pictures."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def runs(cls) -> bool:
        """Return whether the unmodified model of this family works in the installed transformers."""
        return version("transformers") not in cls.broken_with

    @classmethod
    @abstractmethod
    def matches(cls, model: Any) -> bool:
        """Whether this adapter knows the model."""

    @property
    @abstractmethod
    def provides(self) -> frozenset[str]:
        """Kinds of signals that this model can give."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """Token id of the image placeholder."""

    @property
    @abstractmethod
    def image_inputs(self) -> frozenset[str]:
        """Names of the model inputs that belong to the vision side; they are replaced by the features."""

    @property
    @abstractmethod
    def llm(self) -> LLMShape:
        """The shape of the language model."""

    @classmethod
    @abstractmethod
    def example(cls) -> Any:
        """Return a tiny model of the family with random weights, the same ones each time, for checks without a hub."""

    def example_text_model(self) -> str:
        """Return the folder of a tiny CLIP checkpoint with random weights that fits `example`.

        Adapters that provide the signals of the question (`TEXT_SIGNALS`) write it.
        """
        raise NotImplementedError(f"{type(self).__name__} provides no text signals, so it has no text model")

    @abstractmethod
    def example_inputs(self, rows: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
        """Return inputs of `forward` and `generate` with random pixels, left-padded.

        Args:
            rows: for each prompt, height x width of its pictures in pixels.
        """

    @abstractmethod
    def encode(
        self, inputs: Mapping[str, Any], needs: Sequence[Signal], pictures: int = 0, text_model: str | None = None
    ) -> Encoding:
        """Run the vision side once and capture the needed signals; those of the question come from `embed_question`.

        Args:
            inputs: the model inputs of the call; only `image_inputs` are read.
            needs: the signals to capture.
            pictures: how many of the images keep their pixels for drawing.
            text_model: the CLIP checkpoint whose projections align features with text.

        Raises:
            ValueError: if a signal names a layer that the vision tower does not have, or the text model does not fit.
        """

    def encode_staged(
        self, inputs: Mapping[str, Any], needs: Sequence[Signal], pictures: int = 0, text_model: str | None = None
    ) -> Encoding:
        """Return the images of a call that is about to lose tokens; here as `encode` does.

        An adapter that can encode them only as far as the answer of a strategy takes it writes it. Kept features are
        the same within rounding.

        Args:
            inputs: the model inputs of the call; only `image_inputs` are read.
            needs: the signals to capture.
            pictures: how many of the images keep their pixels for drawing.
            text_model: the CLIP checkpoint whose projections align features with text.
        """
        return self.encode(inputs, needs, pictures, text_model)

    def has_pictures(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether a call brings pictures that are not encoded yet."""
        return inputs.get(self.pixels) is not None

    def attached(self) -> AbstractContextManager[None]:
        """Return what must be on the model while a strategy is attached, beside the hooks that every model gets."""
        return nullcontext()

    @abstractmethod
    def hand_over(
        self, encoding: Encoding, packed: list[Tensor], places: Sequence[Tensor] | None = None
    ) -> dict[str, Any]:
        """Return the model inputs that carry features past the vision side.

        Args:
            encoding: what `encode` returned.
            packed: the kept features of each image, `[kept, dim]` each.
            places: which position of each image they come from, `[kept]` each, for whatever else the model keeps per
                position; None is all of them in order.
        """

    def placeholders(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the image positions of the prompt, bool `[rows, length]`.

        Raises:
            ValueError: if there is no prompt.
        """
        ids = inputs.get("input_ids")
        if ids is not None:
            return torch.as_tensor(ids == self.image_token_id)
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            raise ValueError("images were given without a prompt; pass input_ids (or inputs_embeds) too")
        embedding = self.model.get_input_embeddings()(torch.tensor(self.image_token_id, device=embeds.device))
        return torch.as_tensor((embeds == embedding).all(dim=-1))

    def positions(self, inputs: Mapping[str, Any], generating: bool) -> Tensor:
        """Return the position ids that the model would give the full prompt, `[..., rows or 1, length]`.

        Args:
            inputs: the model inputs of the call, vision inputs included.
            generating: whether `generate` asks, which counts from the attention mask.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        if not generating:
            return self.forward_positions(given)
        return torch.as_tensor(self.model._prepare_position_ids_for_generation(self.placeholders(inputs), given))

    def forward_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the position ids that `forward` would make by itself, `[..., rows or 1, length]`."""
        placeholders = self.placeholders(inputs)
        return torch.arange(placeholders.shape[1], device=placeholders.device)[None]

    def counted_positions(self, mask: Tensor) -> Tensor:
        """Return the position ids of a prompt that is counted anew, `[..., rows, length]`.

        Args:
            mask: real positions, bool `[rows, length]`.
        """
        return counted_positions(mask)

    def encode_resized(self, inputs: Mapping[str, Any], grids: Sequence[tuple[int, int] | None]) -> list[Tensor]:
        """Return each image encoded at a lower resolution, as it would enter the LLM, `[length, dim]` each.

        Adapters that provide the signal ``"resolution"`` write it.

        Args:
            inputs: the vision inputs of a call.
            grids: for each image, height x width of the tokens of a tile; None encodes nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} provides no other resolution")

    def unencoded(self, inputs: Mapping[str, Any], pictures: int = 0) -> Encoding:
        """Return an encoding with layouts and no features, before the vision tower has run.

        Adapters that provide the signal ``"resolution"`` write it.

        Args:
            inputs: the model inputs of the call.
            pictures: how many of the images keep their pixels for drawing.
        """
        raise NotImplementedError(f"{type(self).__name__} provides no other resolution")

    def tiles(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Return the pixels of each image as the model is given them, base tile first.

        Adapters of models at whose pictures a second model can look (`SecondLook`) write it.

        Args:
            inputs: the vision inputs of a call.
            layouts: the layouts of its images.

        Returns:
            `[tiles, 3, height, width]` for each image.
        """
        raise NotImplementedError(f"{type(self).__name__} shows no tiles, so no second model can look at them")

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and standard deviation of the colours with which the model's processor normalises pictures.

        Adapters that write `tiles` write it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not know how its pictures are normalised")

    def project(self, features: Tensor) -> Tensor:
        """Return the projector's output for mixtures of its inputs, `[kept, width]` to `[kept, dim]`.

        Adapters that provide the signal ``"projector_inputs"`` write it.
        """
        raise NotImplementedError(f"{type(self).__name__} provides no projector_inputs, so it cannot project them")

    def embed_question(self, text: str, text_model: str | None) -> Mapping[str, Tensor]:
        """Return the signals of a question by kind.

        Adapters that provide the signals of the question (`TEXT_SIGNALS`) write it.

        Args:
            text: the question.
            text_model: the CLIP checkpoint with the text tower.
        """
        raise NotImplementedError(f"{type(self).__name__} provides no text signals, so it cannot embed a question")

    def read_questions(self, input_ids: Tensor, attention_mask: Tensor | None, tokenizer: Any = None) -> list[str]:
        """Return what the user asks in each prompt row: the text of the last turn, without template and pictures.

        Adapters that provide the signals of the question (`TEXT_SIGNALS`) write it.

        Args:
            input_ids: prompts, `[rows, length]`.
            attention_mask: real positions, `[rows, length]`.
            tokenizer: decodes the ids; that of the model's own folder or hub id if left out.
        """
        raise NotImplementedError(f"{type(self).__name__} provides no text signals, so it reads no questions")


@cache
def adapters() -> Mapping[str, type[Adapter]]:
    """Return all known adapters by class name."""
    return collect(ADAPTERS, Adapter)  # type: ignore[type-abstract]


def find_adapter(model: Any) -> Adapter:
    """Return the adapter of a model, bound to it: a shipped one, one of an entry point, or one defined in this session.

    Raises:
        TypeError: if no adapter knows the model; the error names the supported families.
    """
    known = adapters().values()
    found = next((one for one in known if one.matches(model)), None)
    found = found or next((one for one in _subclasses(Adapter) if one.matches(model)), None)  # type: ignore[type-abstract]
    if found is not None:
        return found(model)
    families = ", ".join(sorted(f"{adapter.family} ({adapter.model_class})" for adapter in known))
    raise TypeError(
        f"no adapter knows {type(model).__name__}. Supported: {families}. For another family, subclass "
        "tokenprune.Adapter, about 40 lines: docs/adapters.md"
    )


def _subclasses(base: type[Adapter]) -> list[type[Adapter]]:
    """Return all concrete classes below a base that were imported so far."""
    found = [one for child in base.__subclasses__() for one in (child, *_subclasses(child))]
    return [one for one in dict.fromkeys(found) if not inspect.isabstract(one)]
