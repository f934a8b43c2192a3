"""The interface between tokenprune and one family of transformers models; `tokenprune.models` holds the families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokenprune.encoder.patches import PatchRecord
from tokenprune.geometry import TileGeometry
from tokenprune.image import EncodedImage, Signal
from tokenprune.packing import KeptPositions
from tokenprune.registry import collect_classes, list_subclasses
from tokenprune.rewrite import TextSeparatorSide, counted_positions

if TYPE_CHECKING:
    from tokenprune.encoder_reducer import EncoderReducer
    from tokenprune.selection import Selection

ADAPTERS = "tokenprune.models"
"""The package of the shipped adapters, and the entry point group of plug-ins."""


@dataclass(frozen=True)
class LLMShape:
    """The dimensions of a decoder, for cost accounting.

    Args:
        heads: query heads per layer.
        kv_heads: key and value heads per layer.
        head_dim: width of a head.
        layer_parameters: number of weights of the linear maps of each decoder layer, without biases.
        head_parameters: number of weights of the language model head.
        element_bytes: bytes of one number in the KV cache.
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
        """Number of weights of the linear maps of all decoder layers."""
        return sum(self.layer_parameters)


class VisualTokens(ABC):
    """The visual tokens of the images of a call, as they enter the LLM without reduction."""

    @abstractmethod
    def all(self) -> list[Tensor]:
        """Return all tokens of each image, newline tokens included, `[length, dim]` each."""

    @abstractmethod
    def gather(self, kept_positions: KeptPositions) -> list[Tensor]:
        """Return the kept tokens of each image, newline tokens included, `[kept, dim]` each.

        Args:
            kept_positions: the kept positions of all images.
        """


@dataclass(frozen=True, eq=False)
class PackedTokens(VisualTokens):
    """Visual tokens that are already computed.

    Args:
        packed: the tokens of each image, `[length, dim]` each.
    """

    packed: list[Tensor]

    def all(self) -> list[Tensor]:
        """Return all tokens of each image, `[length, dim]` each."""
        return self.packed

    def gather(self, kept_positions: KeptPositions) -> list[Tensor]:
        """Return the kept tokens of each image, `[kept, dim]` each."""
        packed = self.packed[0] if len(self.packed) == 1 else torch.cat(self.packed)
        return list(packed[kept_positions.index.to(packed.device)].split(kept_positions.lengths))


@dataclass(frozen=True, eq=False)
class Encoding:
    """The encoded images of one call, in the order of the prompts.

    Args:
        images: the input of a strategy, one per image.
        tokens: the visual tokens of the images.
        outputs: the model's own output object of `get_image_features`; None if the tower stopped early.
        inputs: the encoded vision inputs, to encode them again at another resolution.
        videos: the model's own output object of the videos of the call; None without videos. Videos are never reduced.
        is_complete: whether `outputs` equals the output object of the unmodified model in every field.
        repeats: how many times the list of images is repeated, for several questions about them.
        encode_again: encodes the images once more: ``encode_again(needs, patch_reducers=..., entering=...)``.
        patches: the patches that remained in the vision tower; None if no strategy acted inside it.
    """

    images: list[EncodedImage]
    tokens: VisualTokens
    outputs: Any = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    videos: Any = None
    is_complete: bool = False
    repeats: int = 1
    encode_again: Callable[..., Encoding] | None = None
    patches: PatchRecord | None = None

    @property
    def packed(self) -> list[Tensor]:
        """All visual tokens of each image, newline tokens included, `[length, dim]` each."""
        return self.tokens.all() * self.repeats

    def gather_kept(self, kept_positions: KeptPositions) -> list[Tensor]:
        """Return the kept tokens of each image, newline tokens included, `[kept, dim]` each.

        Args:
            kept_positions: the kept positions of all images.
        """
        if self.repeats == 1:
            return self.tokens.gather(kept_positions)
        return PackedTokens(self.packed).gather(kept_positions)

    def repeat(self, times: int) -> Encoding:
        """Return the encoding with its list of images repeated, for several questions about them."""
        return replace(self, images=self.images * times, repeats=self.repeats * times)

    def reduce_patches(
        self,
        needs: Sequence[Signal],
        patch_reducers: Sequence[EncoderReducer],
        entering: Sequence[Selection] | None = None,
    ) -> Encoding:
        """Return the images encoded once more, with strategies before or inside the vision tower.

        Args:
            needs: the signals to capture.
            patch_reducers: the strategies inside the vision tower.
            entering: as in `Adapter.encode`.

        Raises:
            ValueError: if the encoding cannot be repeated.
        """
        if self.encode_again is None:
            raise ValueError(
                "this encoding cannot be computed again for a strategy inside the vision tower; pass the model inputs "
                "without encoding"
            )
        encoding = self.encode_again(needs, patch_reducers=patch_reducers, entering=entering)
        pairs = zip(encoding.images, self.images, strict=False)  # the list of images is repeated here
        images = [replace(image, pixels=source.pixels) for image, source in pairs]
        return replace(encoding, images=images).repeat(self.repeats)


@dataclass(frozen=True, eq=False)
class FeatureInputs:
    """Model inputs that replace the vision inputs of a call.

    Args:
        inputs: keyword inputs of `forward` and `generate`.
        context: the context manager to hold while the model runs on them; None if the model accepts them unmodified.
    """

    inputs: dict[str, Any]
    context: AbstractContextManager[None] | None = None


class Adapter(ABC):
    """One supported model family, bound to one live model. It is independent of all strategies.

    An adapter also inherits from the classes of `tokenprune.capabilities` whose methods it implements.

    Args:
        model: a model for which `matches` returns True.
    """

    family: ClassVar[str]
    """Name of the family in transformers (`config.model_type`)."""

    model_class: ClassVar[str]
    """Name of the transformers class."""

    pixels: ClassVar[str] = "pixel_values"
    """Name of the model input that holds the images; a call without this input has no images."""

    required_inputs: ClassVar[tuple[str, ...]] = ()
    """Names of the vision inputs, besides the pixels, that the layout of an image requires."""

    video_pixels: ClassVar[str] = "pixel_values_videos"
    """Name of the model input that holds the frames of videos. Videos are never reduced."""

    broken_with: ClassVar[frozenset[str]] = frozenset()
    """Versions of transformers in which the unmodified model of this family raises an error."""

    has_prompt_tokens: ClassVar[bool] = True
    """Whether visual tokens are positions of the prompt. If not, the LLM reads them by cross-attention, and the prompt
    is not shortened."""

    has_vision_positions: ClassVar[bool] = False
    """Whether the model computes position ids from its vision inputs (M-RoPE). If so, they are computed before features
    replace these inputs, and passed with the features."""

    text_separator_side: ClassVar[TextSeparatorSide] = "none"
    """The side of the visual tokens to which a text separator between rows or tiles belongs."""

    patch_steps: ClassVar[frozenset[str]] = frozenset()
    """What strategies inside the vision tower can do with patches: ``"drop"`` and ``"merge"``."""

    supports_beams: ClassVar[bool] = True
    """Whether the unmodified model supports beam search on prompts with images."""

    supports_image_embeds: ClassVar[bool] = False
    """Whether a server accepts the visual tokens of an image, one sequence of vectors, in place of the image."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def supports_transformers(cls) -> bool:
        """Return whether the unmodified model of this family works with the installed transformers."""
        return version("transformers") not in cls.broken_with

    @classmethod
    @abstractmethod
    def matches(cls, model: Any) -> bool:
        """Return whether this adapter supports the model."""

    @property
    @abstractmethod
    def provides(self) -> frozenset[str]:
        """Kinds of signals that this model provides."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """Token id of the image placeholder."""

    @property
    @abstractmethod
    def image_inputs(self) -> frozenset[str]:
        """Names of the model inputs of the vision side. Features replace these inputs."""

    @property
    @abstractmethod
    def llm(self) -> LLMShape:
        """The shape of the language model."""

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image of a call without encoding the images.

        Args:
            inputs: the model inputs of the call.

        Raises:
            ValueError: if a vision input is missing or does not match the prompt.
        """

    @abstractmethod
    def encode(
        self,
        inputs: Mapping[str, Any],
        needs: Sequence[Signal],
        keep_pixels: int = 0,
        text_model: str | None = None,
        truncated: bool = False,
        patch_reducers: Sequence[EncoderReducer] = (),
        entering: Sequence[Selection] | None = None,
    ) -> Encoding:
        """Return the encoded images of a call with the required signals, from one run of the vision side.

        Signals of the question come from `ReadsQuestion.embed_question`.

        Args:
            inputs: the model inputs of the call; only `image_inputs` are read.
            needs: the signals to capture.
            keep_pixels: number of images that keep their pixels for drawing.
            text_model: the CLIP checkpoint whose projections align features with text.
            truncated: whether the tower may stop after the last required layer, and the projector may run on kept
                tokens only. Kept features are equal up to rounding; `Encoding.is_complete` is False.
            patch_reducers: strategies that drop or merge patches inside the tower; the adapter inherits from
                `ReducesPatches` if it supports them.
            entering: the selection of each image, with the number of its tokens, whose patches enter the tower; None
                encodes all patches. An adapter that provides ``"patch_removal"`` supports it.

        Raises:
            ValueError: if a signal names a layer that the vision tower does not have, or if the text model does not
                match the tower.
        """

    def keeps_all_patches(
        self, patch_reducers: Sequence[EncoderReducer], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> bool:
        """Return whether strategies inside the vision tower drop and merge no patch of a call.

        Args:
            patch_reducers: the strategies.
            layouts: the layouts of the images.
            inputs: the vision inputs of the call.
        """
        return not patch_reducers

    def count_patches(self, layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]) -> int:
        """Return the patches of a call without reduction, summed over tiles and the layers of the tower that run.

        Args:
            layouts: the layouts of the images.
            inputs: the vision inputs of the call.
        """
        return 0

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether a call contains images that are not yet encoded."""
        return inputs.get(self.pixels) is not None

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise an error if a call with images lacks a vision input that their layouts require.

        Args:
            inputs: the model inputs of the call.

        Raises:
            ValueError: if a vision input is missing.
        """
        if inputs.get(self.pixels) is None:
            return
        missing = [name for name in self.required_inputs if inputs.get(name) is None]
        if missing:
            raise self.input_error(f"{type(self.model).__name__} needs {' and '.join(missing)} besides {self.pixels}")

    def input_tensor(
        self, inputs: Mapping[str, Any], name: str, shape: Sequence[int | None], convert: bool = False
    ) -> Tensor:
        """Return a vision input as a tensor after a check of its type and shape.

        Args:
            inputs: the model inputs of the call.
            name: the name of the input.
            shape: its expected shape; None accepts any length.
            convert: whether arrays and lists of numbers are converted, for a model that accepts them.

        Raises:
            ValueError: if the input is not a tensor of this shape.
        """
        value, size = inputs[name], ", ".join("any" if side is None else str(side) for side in shape)
        requirement = f"{type(self.model).__name__} needs {name} as a tensor of shape [{size}]"
        try:
            needs_conversion = convert and not isinstance(value, Tensor)
            tensor = torch.stack([torch.as_tensor(row) for row in value]) if needs_conversion else value
        except (TypeError, ValueError, RuntimeError) as error:
            raise self.input_error(f"{requirement}, but it is {value!r:.80}") from error
        if not isinstance(tensor, Tensor):
            raise self.input_error(f"{requirement}, but it is a {type(value).__name__}")
        expected = [side if length is None else length for side, length in zip(tensor.shape, shape, strict=False)]
        if tensor.dim() != len(shape) or list(tensor.shape) != expected:
            raise self.input_error(f"{requirement}, but its shape is {list(tensor.shape)}")
        return tensor

    def input_error(self, fault: str) -> ValueError:
        """Return an error about the vision inputs of a call; its text names the processor of the model.

        Args:
            fault: the fault and the expected input.
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
        self, encoding: Encoding, packed: list[Tensor], positions: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return model inputs with the given features in place of the vision inputs.

        Args:
            encoding: the result of `encode`.
            packed: the kept features of each image, `[kept, dim]` each.
            positions: the position of each kept feature in its packed image, `[kept]` each. It indexes further data
                that the model stores per position. None means all positions in order.
        """

    def complete_inputs(self, encoding: Encoding) -> FeatureInputs:
        """Return model inputs with all features, for which the model returns the output object of the unmodified model.

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
            raise ValueError("the call has images but no prompt; pass input_ids or inputs_embeds as well")
        embedding = self.model.get_input_embeddings()(torch.tensor(self.image_token_id, device=embeds.device))
        return torch.as_tensor((embeds == embedding).all(dim=-1))

    def compute_position_ids(self, inputs: Mapping[str, Any], for_generate: bool) -> Tensor:
        """Return the position ids that the model computes for the full prompt, `[..., rows or 1, length]`.

        Args:
            inputs: the model inputs of the call, vision inputs included.
            for_generate: whether the inputs are for `generate`, which derives positions from the attention mask.
        """
        arguments = {name: value for name, value in inputs.items() if value is not None}
        if not for_generate:
            return self.compute_forward_position_ids(arguments)
        return torch.as_tensor(self.model._prepare_position_ids_for_generation(self.placeholders(inputs), arguments))

    def compute_forward_position_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the position ids that `forward` computes by default, `[..., rows or 1, length]`."""
        placeholders = self.placeholders(inputs)
        return torch.arange(placeholders.shape[1], device=placeholders.device)[None]

    def count_position_ids(self, mask: Tensor) -> Tensor:
        """Return position ids that count the real positions of a prompt, `[..., rows, length]`.

        Args:
            mask: real (not padding) positions, bool `[rows, length]`.
        """
        return counted_positions(mask)


@cache
def adapters() -> Mapping[str, type[Adapter]]:
    """Return all adapters by class name: shipped ones and plug-ins."""
    return collect_classes(ADAPTERS, Adapter)


def find_adapter(model: Any) -> Adapter:
    """Return an adapter that supports a model, bound to it.

    Shipped adapters and plug-ins come first, then adapters that were defined in this session.

    Raises:
        TypeError: if no adapter supports the model; the error names the supported families.
    """
    candidates = adapters().values()
    match = next((kind for kind in candidates if kind.matches(model)), None)
    if match is None:
        families = [kind for kind in list_subclasses(Adapter) if hasattr(kind, "family")]
        match = next((kind for kind in families if kind.matches(model)), None)
    if match is not None:
        return match(model)
    names = ", ".join(sorted(f"{kind.family} ({kind.model_class})" for kind in candidates))
    name = type(model).__name__
    complete = f"{name.removesuffix('Model')}ForConditionalGeneration"
    if complete in {kind.model_class for kind in candidates}:
        raise TypeError(f"{name} is a part of {complete}; pass the complete model")
    raise TypeError(
        f"no adapter supports {name}. Supported: {names}. For another family, subclass "
        "tokenprune.Adapter, about 40 lines: docs/how-to/write-an-adapter.md"
    )
