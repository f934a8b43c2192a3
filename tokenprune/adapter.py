"""The interface between tokenprune and one family of transformers models; the families are in `tokenprune.models`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
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
        heads: query heads per layer.
        kv_heads: key and value heads per layer.
        head_dim: width of a head.
        layer_parameters: weights of the linear maps of each decoder layer (biases left out).
        head_parameters: weights of the language model head.
        element_bytes: bytes of one cached number.
    """

    heads: int
    kv_heads: int
    head_dim: int
    layer_parameters: tuple[int, ...]
    head_parameters: int
    element_bytes: int

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_parameters)

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear maps of all decoder layers."""
        return sum(self.layer_parameters)


class VisualTokens(ABC):
    """The visual tokens of the images of a call, as they would enter the LLM with nothing dropped."""

    @abstractmethod
    def all(self) -> list[Tensor]:
        """Return all tokens of each image, newline tokens included, `[length, dim]` each."""

    @abstractmethod
    def gather(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the kept tokens of each image, `[kept, dim]` each.

        Args:
            masks: the kept positions of each packed image, bool `[length]` each.
        """


@dataclass(frozen=True, eq=False)
class PackedTokens(VisualTokens):
    """Visual tokens that are computed already.

    Args:
        packed: the tokens of each image, `[length, dim]` each.
    """

    packed: list[Tensor]

    def all(self) -> list[Tensor]:
        """Return all tokens of each image, `[length, dim]` each."""
        return self.packed

    def gather(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the kept tokens of each image, `[kept, dim]` each."""
        return [tokens[mask.to(tokens.device)] for tokens, mask in zip(self.packed, masks, strict=True)]


@dataclass(frozen=True, eq=False)
class Encoding:
    """The encoded images of one call, in the order of their places in the prompt.

    Args:
        images: the input of a strategy, one per image.
        tokens: the visual tokens of the images.
        outputs: the model's own output object of `get_image_features`; None if its tower was left early.
        inputs: the vision inputs that were encoded, to encode them at another resolution.
        videos: the model's own output object of videos in the same call, if there are any; they are never reduced.
        complete: whether `outputs` equals that of the unmodified model in every field.
        repeats: how many times the images are listed, for several questions about them.
    """

    images: list[EncodedImage]
    tokens: VisualTokens
    outputs: Any = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    videos: Any = None
    complete: bool = False
    repeats: int = 1

    @property
    def packed(self) -> list[Tensor]:
        """All visual tokens of each image, newline tokens included, `[length, dim]` each."""
        return self.tokens.all() * self.repeats

    def gather_kept(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the kept tokens of each image, `[kept, dim]` each.

        Args:
            masks: the kept positions of each packed image, bool `[length]` each.
        """
        if self.repeats == 1:
            return self.tokens.gather(masks)
        return PackedTokens(self.packed).gather(masks)

    def repeated(self, times: int) -> Encoding:
        """Return the encoding with its images listed several times, for several questions about them."""
        return replace(self, images=self.images * times, repeats=self.repeats * times)


@dataclass(frozen=True, eq=False)
class FeatureInputs:
    """Model inputs that replace the vision inputs of a call.

    Args:
        inputs: keyword inputs of `forward` and `generate`.
        context: the context to hold while the model runs on them; None if the unmodified model takes them.
    """

    inputs: dict[str, Any]
    context: AbstractContextManager[None] | None = None


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
    """Name of the model input that holds the images; a call without it has none."""

    required_inputs: ClassVar[tuple[str, ...]] = ()
    """Names of vision inputs, beside the pixels, without which the layout of an image is unknown."""

    video_pixels: ClassVar[str] = "pixel_values_videos"
    """Name of the model input that holds the frames of videos; they are never reduced."""

    broken_with: ClassVar[frozenset[str]] = frozenset()
    """Versions of transformers whose own model of this family raises; nothing can be attached to it there."""

    in_prompt: ClassVar[bool] = True
    """Whether visual tokens stand in the prompt; else the LLM attends to them from outside, and it stays as it is."""

    vision_positions: ClassVar[bool] = False
    """Whether the model makes position ids from its vision inputs (M-RoPE): they are then handed over, too."""

    text_separator_side: ClassVar[TextSeparatorSide] = "none"
    """Where text inside the span of an image belongs, if there is any that separates rows or tiles."""

    beams: ClassVar[bool] = True
    """Whether the unmodified model generates with beams from images."""

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
            rows: for each prompt, height x width of its images in pixels.
        """

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image of a call, without encoding it.

        Args:
            inputs: the model inputs of the call.

        Raises:
            ValueError: if a vision input is missing or does not fit the prompt.
        """

    @abstractmethod
    def encode(
        self,
        inputs: Mapping[str, Any],
        needs: Sequence[Signal],
        keep_pixels: int = 0,
        text_model: str | None = None,
        truncated: bool = False,
    ) -> Encoding:
        """Run the vision side once and capture the needed signals; those of the question come from `embed_question`.

        Args:
            inputs: the model inputs of the call; only `image_inputs` are read.
            needs: the signals to capture.
            keep_pixels: how many of the images keep their pixels for drawing.
            text_model: the CLIP checkpoint whose projections align features with text.
            truncated: whether the tower may stop after the last required layer, and the projector may run on kept
                tokens only. Kept features are equal up to rounding; `Encoding.complete` is False.

        Raises:
            ValueError: if a signal names a layer that the vision tower does not have, or the text model does not fit.
        """

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether a call contains images that are not encoded yet."""
        return inputs.get(self.pixels) is not None

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Check that a call with images has every vision input that their layouts require.

        Args:
            inputs: the model inputs of the call.

        Raises:
            ValueError: if a vision input is missing.
        """
        if inputs.get(self.pixels) is None:
            return
        missing = [name for name in self.required_inputs if inputs.get(name) is None]
        if missing:
            raise self.input_error(f"{type(self.model).__name__} needs {' and '.join(missing)} beside {self.pixels}")

    def input_tensor(
        self, inputs: Mapping[str, Any], name: str, shape: Sequence[int | None], convert: bool = False
    ) -> Tensor:
        """Return a vision input after a check of its type and shape.

        Args:
            inputs: the model inputs of the call.
            name: the name of the input.
            shape: its expected shape; None stands for any length.
            convert: whether arrays and lists of numbers are read, too, because the model takes them.

        Raises:
            ValueError: if the input is no tensor of this shape.
        """
        value, size = inputs[name], ", ".join("any" if side is None else str(side) for side in shape)
        expected = f"{type(self.model).__name__} needs {name} as a tensor of shape [{size}]"
        try:
            is_read = convert and not isinstance(value, Tensor)
            tensor = torch.stack([torch.as_tensor(row) for row in value]) if is_read else value
        except (TypeError, ValueError, RuntimeError) as error:
            raise self.input_error(f"{expected}, but it is {value!r:.80}") from error
        if not isinstance(tensor, Tensor):
            raise self.input_error(f"{expected}, but it is a {type(value).__name__}")
        sides = [side if wanted is None else wanted for side, wanted in zip(tensor.shape, shape, strict=False)]
        if tensor.dim() != len(shape) or list(tensor.shape) != sides:
            raise self.input_error(f"{expected}, but its shape is {list(tensor.shape)}")
        return tensor

    def input_error(self, fault: str) -> ValueError:
        """Return an error about the vision inputs of a call that names the processor of the model.

        Args:
            fault: what is wrong and what was expected.
        """
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

        processor = PROCESSOR_MAPPING_NAMES.get(getattr(getattr(self.model, "config", None), "model_type", ""))
        name = f" ({processor})" if processor else ""
        return ValueError(f"{fault}; make the inputs with the processor that belongs to the model{name}")

    def has_only_videos(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether a call contains videos and no image."""
        return inputs.get(self.video_pixels) is not None and inputs.get(self.pixels) is None

    @abstractmethod
    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], places: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return the model inputs that carry features past the vision side.

        Args:
            encoding: the result of `encode`.
            packed: the kept features of each image, `[kept, dim]` each.
            places: the position of each kept feature in its packed image, `[kept]` each, for anything else that the
                model stores per position; None is all of them in order.
        """

    def complete_inputs(self, encoding: Encoding) -> FeatureInputs:
        """Return the model inputs that carry all features, so that the output object is the unmodified model's.

        Args:
            encoding: a complete encoding.
        """
        return self.features_to_inputs(encoding, encoding.packed)

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
            raise ValueError("the call has images and no prompt; pass input_ids (or inputs_embeds), too")
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

    def unencoded(self, inputs: Mapping[str, Any], keep_pixels: int = 0) -> Encoding:
        """Return an encoding with layouts and no features, before the vision tower has run.

        Adapters that provide the signal ``"resolution"`` write it.

        Args:
            inputs: the model inputs of the call.
            keep_pixels: how many of the images keep their pixels for drawing.
        """
        raise NotImplementedError(f"{type(self).__name__} provides no other resolution")

    def tiles(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Return the pixels of each image as the model is given them, base tile first.

        Adapters of models at whose images a second model can look (`SaliencyModel`) write it.

        Args:
            inputs: the vision inputs of a call.
            layouts: the layouts of its images.

        Returns:
            `[tiles, 3, height, width]` for each image.
        """
        raise NotImplementedError(f"{type(self).__name__} shows no tiles, so no second model can look at them")

    def pixel_mean_std(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and standard deviation of the colors with which the model's processor normalizes images.

        Adapters that write `tiles` write it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not know how its images are normalised")

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
        """Return what the user asks in each prompt row: the text of the last turn, without template and images.

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
        "tokenprune.Adapter, about 40 lines: docs/how-to/write-an-adapter.md"
    )


def _subclasses(base: type[Adapter]) -> list[type[Adapter]]:
    """Return all concrete classes below a base that were imported so far."""
    found = [one for child in base.__subclasses__() for one in (child, *_subclasses(child))]
    return [one for one in dict.fromkeys(found) if not inspect.isabstract(one)]
