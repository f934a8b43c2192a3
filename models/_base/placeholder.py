"""Base class of adapters whose models replace placeholder tokens with the output of `get_image_features`.

`PlaceholderAdapter` encodes images, captures signals, and passes kept features to the model. A family adds class
attributes with the paths of its modules, and the layout of its images.
"""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from tokenprune.adapter import Adapter, Encoding, FeatureInputs, LLMShape, PackedTokens, VisualTokens
from tokenprune.capabilities import ProjectsMixtures, ReadsQuestion, Resizable, ShowsTiles
from tokenprune.geometry import NEWLINE, TileGeometry
from tokenprune.image import (
    ALIGNED_FROM,
    ALIGNED_SIGNALS,
    CLS_SIGNALS,
    ROW_SIGNALS,
    TEXT_SIGNALS,
    EncodedImage,
    Signal,
    SignalKey,
    token_dim,
)
from tokenprune.models._base.clip_text import extract_question, load_text_tower
from tokenprune.models._base.linear_weights import linear_weights
from tokenprune.models._capture.hooks import Tower, capture_signals, resolve_signals
from tokenprune.models._capture.truncated_tower import ProjectedTokens, run_until, skipped_layers


class PlaceholderAdapter(Adapter, ReadsQuestion, Resizable, ShowsTiles, ProjectsMixtures):
    """An adapter of a model whose image features fill placeholders in the prompt.

    A family sets the class attributes with the paths of its modules, and implements `layouts`. Encoding, capturing and
    passing on features are the same for all families.
    """

    tower_path: ClassVar[str] = "vision_tower"
    """Path of the vision tower in the base model."""
    layers_path: ClassVar[str] = "encoder.layers"
    """Path of the encoder layers in the tower."""
    attention_name: ClassVar[str] = "self_attn"
    """Name of the attention module in a layer of the tower; the module uses transformers' `AttentionInterface`."""
    projector_path: ClassVar[str | None] = "multi_modal_projector"
    """Path in the base model of the module that maps each visual token independently; None if there is none."""
    language_model_path: ClassVar[str] = "language_model"
    """Path of the decoder in the base model."""
    pooling_config_key: ClassVar[str | None] = None
    """Config entry with the number of patches along a side of one visual token; None if a token is one patch."""
    patch_order: ClassVar[str] = "(h p w q)"
    """Order of the patches of a tile in the tower; token ``(h, w)`` consists of ``p x q`` patches (einops)."""
    base_first: ClassVar[bool] = True
    """Whether the base tile is encoded and packed before the sub-images, or after them."""
    one_sequence: ClassVar[bool] = False
    """Whether the tower runs over all images as one sequence; each image is then one tile of its own size."""
    features_by_tile: ClassVar[bool] = False
    """Whether `get_image_features` returns a tensor with a row for each tile instead of a list."""
    features_field: ClassVar[str] = "pooler_output"
    """Field of the output of `get_image_features` that fills the placeholders."""
    resizable: ClassVar[bool] = False
    """Whether the tower accepts tiles of other sizes (`interpolate_pos_encoding`)."""
    post_norm_path: ClassVar[str | None] = None
    """Path in the tower of the norm that the model applies to the layer outputs; None if it uses them unnormalized."""
    projects_per_token: ClassVar[bool] = False
    """Whether, after the tower, a visual token depends on its own patches only. An image then consists of such tokens
    and newline tokens, and `project_patches` computes the tokens."""
    passes_output_options: ClassVar[bool] = False
    """Whether the model's `forward` passes `output_attentions` and `output_hidden_states` to its vision side."""

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image of a call."""

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Return whether the model or one of its base classes has the class name of this family."""
        return any(base.__name__ == cls.model_class for base in type(model).__mro__)

    @cached_property
    def tower(self) -> Any:
        """The vision tower."""
        return attrgetter(self.tower_path)(self.model.base_model)

    @cached_property
    def tower_layers(self) -> Sequence[nn.Module]:
        """The encoder layers of the vision tower."""
        layers: Sequence[nn.Module] = attrgetter(self.layers_path)(self.tower)
        return layers

    @cached_property
    def cls(self) -> Literal["none", "first", "last"]:
        """Position of the CLS token in the sequence of the tower."""
        embeddings = getattr(self.tower, "embeddings", None)
        return "first" if any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token")) else "none"

    @property
    def has_cls(self) -> bool:
        """Whether the tower has a CLS token."""
        return self.cls != "none"

    @cached_property
    def pooling_head(self) -> nn.MultiheadAttention | None:
        """The attention of SigLIP's pooling head; None if the checkpoint has no such head."""
        head = getattr(getattr(self.tower, "head", None), "attention", None)
        return head if isinstance(head, nn.MultiheadAttention) else None

    @cached_property
    def pooling(self) -> int:
        """Number of patches along a side of one visual token."""
        return 1 if self.pooling_config_key is None else int(getattr(self.model.config, self.pooling_config_key))

    @property
    def provides(self) -> frozenset[str]:
        """Kinds of signals that this model provides."""
        kinds = {"received_attention", "keys", "vision_features"}
        if self.projector_path is not None:
            kinds |= {"projector_inputs"}
        if self.resizable:
            kinds |= {"resolution"}
        if self.has_cls:
            kinds |= {"cls_attention", "cls_logits", "joint_attention", "cls_features"}
        if self.pooling_head is not None:
            kinds |= {"pooling_attention"}
        if self.tower.config.model_type == "clip_vision_model":
            kinds |= ALIGNED_SIGNALS | TEXT_SIGNALS
        return frozenset(kinds)

    @property
    def image_token_id(self) -> int:
        """Token id of the image placeholder."""
        token: int = self.model.config.image_token_id
        return token

    @cached_property
    def image_inputs(self) -> frozenset[str]:
        """The parameters of the model's `get_image_features` and, if it has one, of `get_video_features`.

        The model accepts pixels or features, not both. Videos in a call with images are therefore encoded, too, and
        passed on unreduced.
        """
        return self._feature_parameters("image") | self._feature_parameters("video")

    def _feature_parameters(self, modality: str) -> frozenset[str]:
        """Return the parameters of the model's function that encodes a modality; empty if it has no such function."""
        encode = getattr(self.model.base_model, f"get_{modality}_features", None)
        return frozenset() if encode is None else frozenset(inspect.signature(encode).parameters) - {"kwargs"}

    @cached_property
    def token_grid(self) -> tuple[int, int]:
        """Height x width of the visual tokens of one tile."""
        config = self.tower.config
        image, patch = (
            size[0] if isinstance(size, (list, tuple)) else size for size in (config.image_size, config.patch_size)
        )
        side = image // patch // self.pooling
        return side, side

    @cached_property
    def decoder(self) -> Any:
        """The module with the decoder layers."""
        return attrgetter(self.language_model_path)(self.model.base_model)

    @cached_property
    def llm(self) -> LLMShape:
        """The shape of the language model."""
        config = self.model.config.get_text_config()
        return LLMShape(
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            layer_parameters=tuple(linear_weights(layer) for layer in self.decoder.layers),
            head_parameters=config.hidden_size * config.vocab_size,
            element_bytes=self.model.dtype.itemsize,
        )

    def feature_layer(self, inputs: Mapping[str, Any]) -> int:
        """Return the index of the deepest layer whose output the model uses.

        Raises:
            ValueError: if the model uses the embeddings, which are no output of a layer.
        """
        return max(self.feature_layers(inputs))

    def feature_layers(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the indices of all layers whose outputs the model uses, side by side.

        If neither the call nor the config names a layer, this is the last layer.

        Raises:
            ValueError: if the model uses the embeddings only, which are no output of a layer.
        """
        setting: Any = inputs.get("vision_feature_layer")
        setting = getattr(self.model.config, "vision_feature_layer", -1) if setting is None else setting
        depth = len(self.tower_layers)
        numbers = setting if isinstance(setting, (list, tuple)) else [setting]
        indices = [depth + number if number < 0 else number - 1 for number in numbers]
        if not 0 <= max(indices) < depth:
            raise ValueError(f"vision_feature_layer={setting!r} is no output of the {depth} layers of the vision tower")
        return indices

    @cached_property
    def projector(self) -> Any:
        """The module that maps features of the vision tower to visual tokens."""
        return attrgetter(self.projector_path or "")(self.model.base_model)

    def project(self, features: Tensor) -> Tensor:
        """Return the projector's output, `[kept, width]` to `[kept, dim]`."""
        projected: Tensor = self.projector(features.to(floating_dtype(self.projector))[None])[0]
        return projected

    def embed_question(self, text: str, text_model: str | None) -> Mapping[str, Tensor]:
        """Return the embeddings of a question by kind, in the space shared by the text model and the vision tower."""
        return load_text_tower(text_model).embed(text, self.model.device)

    def read_questions(self, input_ids: Tensor, attention_mask: Tensor | None, tokenizer: Any = None) -> list[str]:
        """Return the question of the user in each prompt row.

        Raises:
            ValueError: if no tokenizer is passed and the model has no folder or hub id (`name_or_path`).
        """
        tokenizer = self._tokenizer if tokenizer is None else getattr(tokenizer, "tokenizer", tokenizer)
        special = [*tokenizer.all_special_tokens, tokenizer.decode([self.image_token_id])]
        real = input_ids != self.image_token_id
        real = real if attention_mask is None else real & attention_mask.bool()
        prompts = [tokenizer.decode(ids[keep]) for ids, keep in zip(input_ids, real, strict=True)]
        return [extract_question(prompt, special) for prompt in prompts]

    @cached_property
    def _tokenizer(self) -> Any:
        name = getattr(self.model, "name_or_path", "")
        if not name:
            raise ValueError(
                "the question cannot be read from the prompt: the model was not loaded from a folder or hub id with a "
                "tokenizer. Attach with reducer(model, tokenizer=processor.tokenizer) or question=..."
            )
        return AutoTokenizer.from_pretrained(name)

    def encode(
        self,
        inputs: Mapping[str, Any],
        needs: Sequence[Signal],
        keep_pixels: int = 0,
        text_model: str | None = None,
        truncated: bool = False,
    ) -> Encoding:
        """Run the vision side once and return the encoded images with the required signals."""
        self.check_select_strategy(inputs)
        feature_layer, layouts = self.feature_layer(inputs), self.layouts(inputs)
        kinds_by_layer = self.required_signals(needs, feature_layer)

        def align(features: Tensor) -> Tensor:
            return load_text_tower(text_model).align(features)

        if any(signal.kind in ALIGNED_SIGNALS for signal in needs):  # if the checkpoint does not fit, raise first
            align(self.model.get_input_embeddings().weight.new_zeros(1, 1, self.tower.config.hidden_size))
        leaves_early = truncated and self.can_leave_early(inputs, needs)
        run = self.run_tower if leaves_early else self._run_vision_side
        tokens, outputs, captured = run(inputs, layouts, kinds_by_layer, truncated)
        signals = {key: self.split_by_image(key[0], parts, layouts, inputs) for key, parts in captured.items()}
        for layer, kinds in kinds_by_layer.items():
            for kind in kinds & ALIGNED_SIGNALS:
                signals[kind, layer] = [align(source) for source in signals[ALIGNED_FROM[kind], layer]]
        pixels = self.drawable_images(inputs, layouts, keep_pixels)
        images = [
            EncodedImage(
                geometry=layout,
                compute_features=partial(_unpack_image, layout, tokens, number),
                device=inputs[self.pixels].device,
                signals={key: parts[number] for key, parts in signals.items()},
                layers=len(self.tower_layers),
                feature_layer=feature_layer,
                newline=self.newline,
                pixels=pixels[number] if number < len(pixels) else None,
            )
            for number, layout in enumerate(layouts)
        ]
        videos = self.encode_videos(inputs)
        return Encoding(images, tokens, outputs, self.vision_arguments(inputs), videos, is_complete=not truncated)

    def _run_vision_side(
        self,
        inputs: Mapping[str, Any],
        layouts: Sequence[TileGeometry],
        kinds_by_layer: dict[int, set[str]],
        truncated: bool,
    ) -> tuple[VisualTokens, Any, dict[SignalKey, list[Tensor]]]:
        """Run the model's own `get_image_features`; return the visual tokens, its output object, and the signals."""
        feature_layer = self.feature_layer(inputs)
        arguments = {**self.vision_arguments(inputs), **self._output_options(inputs)}
        reads_head = any("pooling_attention" in kinds for kinds in kinds_by_layer.values())
        reads_projector = any("projector_inputs" in kinds for kinds in kinds_by_layer.values())
        with ExitStack() as stack:
            if truncated and not reads_head:
                head = self.tower.head if self.pooling_head is not None else None
                stack.enter_context(skipped_layers(self.tower_layers, max([feature_layer, *kinds_by_layer]), head))
            captured = stack.enter_context(capture_signals(self.tower_parts(layouts), kinds_by_layer))
            projector_inputs = stack.enter_context(self.capture_projector_inputs(reads_projector))
            outputs = self.run_vision(arguments, layouts)
        if reads_projector:
            captured["projector_inputs", feature_layer] = projector_inputs
        return PackedTokens(self.split_features(outputs, layouts)), outputs, captured

    def run_tower(
        self,
        inputs: Mapping[str, Any],
        layouts: Sequence[TileGeometry],
        kinds_by_layer: dict[int, set[str]],
        truncated: bool,
    ) -> tuple[VisualTokens, Any, dict[SignalKey, list[Tensor]]]:
        """Run the tower up to the last required layer; return the visual tokens, None, and the captured signals.

        Args:
            inputs: the model inputs of the call.
            layouts: the layouts of its images.
            kinds_by_layer: kinds of signals per layer index.
            truncated: always True.

        Raises:
            ValueError: if the number of tiles differs from the layouts.
        """
        feature_layers, images = self.feature_layers(inputs), self.split_pixels(inputs, layouts)
        tiles = [image[: layout.tiles] for image, layout in zip(images, layouts, strict=False)]
        if len(images) != len(layouts) or any(
            len(image) != layout.tiles for image, layout in zip(tiles, layouts, strict=True)
        ):
            raise ValueError(
                f"{self.pixels} hold {len(images)} images of {list(map(len, tiles))} tiles, but their layouts have "
                f"{[layout.tiles for layout in layouts]}; make the inputs with the processor that belongs to the model"
            )
        pixels, last = torch.cat(tiles).to(floating_dtype(self.tower)), max([*feature_layers, *kinds_by_layer])
        parts = self.tower_parts(layouts)
        with capture_signals(parts, kinds_by_layer) as captured:
            outputs = run_until(partial(self.tower, pixels), self.tower_layers, last, feature_layers)
        hidden = torch.cat(outputs, dim=-1)[:, parts.prefix :]
        if any("projector_inputs" in kinds for kinds in kinds_by_layer.values()):
            captured["projector_inputs", max(feature_layers)] = [self.apply_post_norm(hidden).detach()]
        return ProjectedTokens(self, layouts, hidden), None, captured

    def required_signals(self, needs: Sequence[Signal], feature_layer: int) -> dict[int, set[str]]:
        """Return the kinds of signals to capture per layer index, including the sources of aligned signals."""
        kinds_by_layer = resolve_signals(needs, len(self.tower_layers), feature_layer)
        for kinds in kinds_by_layer.values():
            kinds |= {source for aligned, source in ALIGNED_FROM.items() if aligned in kinds}
        return kinds_by_layer

    def can_leave_early(self, inputs: Mapping[str, Any], needs: Sequence[Signal]) -> bool:
        """Return whether the tower can be left after the last required layer.

        False in these cases: training with gradients, which can recompute layers; weights that are moved to the device
        module by module; signals of the pooling head; inputs of a projector that pools.

        Args:
            inputs: the model inputs of the call.
            needs: the signals to capture.
        """
        kinds = {signal.kind for signal in needs}
        return (
            self.projects_per_token
            and not (torch.is_grad_enabled() and self.model.training)
            and len(set((getattr(self.model, "hf_device_map", None) or {"": 0}).values())) == 1
            and "pooling_attention" not in kinds
            and not ("projector_inputs" in kinds and self.pooling > 1)
            and min(self.feature_layers(inputs)) >= 0
        )

    def project_patches(self, patches: Tensor) -> Tensor:
        """Return the visual tokens of the given patches, `[tokens, dim]`.

        Args:
            patches: outputs of the feature layers for the patches of each token, row by row,
                `[tokens, patches, width]`.
        """
        tokens: Tensor = self.projector(self.apply_post_norm(patches).transpose(0, 1))[0]
        return tokens

    def project_tiles(self, hidden: Tensor, patches: Tensor) -> Tensor:
        """Return all visual tokens of the given tiles, `[tiles * tokens, dim]`.

        Args:
            hidden: outputs of the feature layers, without CLS, `[tiles, sequence, width]`.
            patches: indices of the patches of each token in the sequence, row by row, `[tokens, patches]`.
        """
        return self.project_patches(hidden[:, patches].flatten(0, 1))

    def apply_post_norm(self, patches: Tensor) -> Tensor:
        """Return outputs of the feature layers after the norm of the tower, if the model applies one."""
        return (
            patches
            if self.post_norm_path is None
            else torch.as_tensor(attrgetter(self.post_norm_path)(self.tower)(patches))
        )

    def vision_arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the vision inputs of a call that belong to its images."""
        names = self.image_inputs - (self._feature_parameters("video") - self._feature_parameters("image"))
        return {name: inputs[name] for name in names if inputs.get(name) is not None}

    def encode_videos(self, inputs: Mapping[str, Any]) -> Any:
        """Return the model's own output object of the videos of a call; None if the call has no videos.

        Args:
            inputs: the model inputs of the call.
        """
        if inputs.get(self.video_pixels) is None or not self._feature_parameters("video"):
            return None
        names = self._feature_parameters("video")
        arguments = {name: inputs[name] for name in names if inputs.get(name) is not None}
        return self.model.base_model.get_video_features(**arguments, **self._output_options(inputs), return_dict=True)

    def _output_options(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options about outputs that the model's `forward` passes to its vision side."""
        if not self.passes_output_options:
            return {}
        options = ("output_attentions", "output_hidden_states")
        return {name: inputs[name] for name in options if inputs.get(name) is not None}

    def run_vision(self, arguments: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Any:
        """Run the model's own vision side once and return its output object.

        Args:
            arguments: the vision inputs of the call.
            layouts: the layouts of the images.
        """
        return self.model.base_model.get_image_features(**arguments, return_dict=True)

    def tower_parts(self, layouts: Sequence[TileGeometry]) -> Tower:
        """Return the modules and the sequence layout of the tower from which signals are captured."""
        patches = [layout.tiles * layout.tokens * self.pooling**2 for layout in layouts]
        segments = patches if self.one_sequence else None
        return Tower(self.tower_layers, self.attention_name, self.cls, segments, pooling=self.pooling_head)

    @contextmanager
    def capture_projector_inputs(self, is_enabled: bool) -> Iterator[list[Tensor]]:
        """Capture the inputs of the projector while the block runs; capture nothing if it is not enabled."""
        parts: list[Tensor] = []
        if not is_enabled:
            yield parts
            return
        hook = self.projector.register_forward_pre_hook(lambda module, args: parts.append(args[0].detach()))
        try:
            yield parts
        finally:
            hook.remove()

    def split_by_image(
        self, kind: str, captured: Sequence[Tensor], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return a captured signal for each image, with the base tile first and patches pooled to tokens.

        Args:
            kind: the kind of the signal.
            captured: the captured tensors, with tiles as the first dimension.
            layouts: the layouts of the images.
            inputs: the model inputs of the call.
        """
        if not layouts:
            return []
        if self.one_sequence:
            values = self.split_sequence(kind, captured, layouts, inputs)
        else:
            values = list(torch.cat(list(captured)).split([layout.tiles for layout in layouts]))
        out = []
        for value, layout in zip(values, layouts, strict=True):
            ordered = value if self.base_first else value.roll(1, 0)
            is_per_patch = kind not in CLS_SIGNALS and kind != "projector_inputs"
            grid = layout.token_grid
            out.append(pool(kind, ordered, grid, self.pooling, self.patch_order) if is_per_patch else ordered)
        return out

    def split_sequence(
        self, kind: str, captured: Sequence[Tensor], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return a signal for each image, `[1, ...]`, if the tower runs over all images as one sequence.

        Args:
            kind: the kind of the signal.
            captured: consecutive parts of the sequence, of any length.
            layouts: the layouts of the images.
            inputs: the model inputs of the call.
        """
        dim = token_dim(kind)
        sequence = torch.cat(list(captured), dim)
        patches = 1 if kind == "projector_inputs" else self.pooling**2
        order = self.sequence_order(inputs)
        if order is not None:
            sequence = sequence.index_select(dim, order.to(sequence.device))
        return list(sequence.split([layout.tokens * patches for layout in layouts], dim))

    def sequence_order(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the index of each patch in the sequence of the tower, `[patches]`; None if the order is the same."""
        return None

    def split_features(self, outputs: Any, layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Return the visual and newline tokens of each image with nothing dropped, `[length, dim]` each."""
        features = outputs[self.features_field]
        flat = features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))
        return list(flat.split([len(layout.packed) for layout in layouts]))

    def drawable_images(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry], number: int) -> list[Tensor]:
        """Return the first `number` images for drawing, base tile first, uint8 `[tiles, height, width, 3]` each."""
        return [to_uint8_images(tiles) for tiles in self.read_tiles(inputs, layouts)[:number]] if number else []

    def build_unencoded(self, inputs: Mapping[str, Any], keep_pixels: int = 0) -> Encoding:
        """Return an encoding with layouts and no features."""
        self.check_select_strategy(inputs)
        arguments = self.vision_arguments(inputs)
        device, layouts = inputs[self.pixels].device, self.layouts(inputs)
        pixels = self.drawable_images(inputs, layouts, keep_pixels)
        images = [
            EncodedImage(
                geometry=layout,
                features=torch.zeros(layout.tiles, layout.tokens, 0, device=device),
                layers=len(self.tower_layers),
                feature_layer=self.feature_layer(inputs),
                pixels=pixels[number] if number < len(pixels) else None,
            )
            for number, layout in enumerate(layouts)
        ]
        tokens = PackedTokens([torch.zeros(len(layout.packed), 0, device=device) for layout in layouts])
        return Encoding(images, tokens, inputs=arguments, videos=self.encode_videos(inputs))

    def read_tiles(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Return the pixels of each image, `[tiles, 3, height, width]` each, base tile first."""
        images = zip(self.split_pixels(inputs, layouts), layouts, strict=True)
        unpadded = [tiles[: layout.tiles] for tiles, layout in images]
        return unpadded if self.base_first else [tiles.roll(1, 0) for tiles in unpadded]

    def pixel_mean_std(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and standard deviation of the colors, read from the configuration of the image processor.

        Raises:
            ValueError: if the configuration is missing or cannot be read.
        """
        name = getattr(self.model, "name_or_path", "")
        try:
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"cannot read the image normalization of {self.model_class} from {name!r} "
                f"({' '.join(str(error).split())[:200]}); pass image_mean and image_std of its image processor"
            ) from error
        if not getattr(processor, "do_normalize", True):
            return [0.0] * 3, [1.0] * 3
        return processor.image_mean, processor.image_std

    def split_pixels(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the pixels of each image, `[tiles, 3, height, width]` each; padding tiles can follow."""
        pixels = inputs[self.pixels]
        return pixels if pixels.dim() == 5 else torch.split(pixels, [layout.tiles for layout in layouts])

    @property
    def newline(self) -> Tensor | None:
        """The learned newline token, `[dim]`; None if the model has no newline token."""
        return None

    def encode_resized(self, inputs: Mapping[str, Any], grids: Sequence[tuple[int, int] | None]) -> list[Tensor]:
        """Shrink the pixels of every tile and run the vision tower with interpolated position embeddings.

        Returns:
            the visual and newline tokens of each image, `[length, dim]` each.
        """
        layouts, setting = self.layouts(inputs), inputs.get("vision_feature_layer")
        setting = self.model.config.vision_feature_layer if setting is None else setting
        patch, packed = self.tower.config.patch_size, []
        for layout, grid, tiles in zip(layouts, grids, self.split_pixels(inputs, layouts), strict=True):
            if grid is None:
                packed.append(torch.zeros(0, self.model.config.get_text_config().hidden_size, device=tiles.device))
                continue
            size = (grid[0] * patch, grid[1] * patch)
            small = F.interpolate(tiles[: layout.tiles].float(), size, mode="bicubic", antialias=True)
            hidden = self.tower(
                small.to(floating_dtype(self.tower)), interpolate_pos_encoding=True, output_hidden_states=True
            ).hidden_states
            outputs = [hidden[index] for index in (setting if isinstance(setting, (list, tuple)) else [setting])]
            features = self.projector(torch.cat(outputs, dim=-1)[:, int(self.has_cls) :]).flatten(0, 1)
            packed.append(self.insert_newlines(features, layout.resized(grid)[0].packed.to(features.device)))
        return packed

    def insert_newlines(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Return visual tokens and newline tokens as they enter the LLM, `[length, dim]`.

        Args:
            tokens: the visual tokens, `[n, dim]`.
            places: index of the visual token at each position, or `NEWLINE` for a newline token, `[length]`.
        """
        packed = tokens[places.clamp(min=0)]
        if self.newline is None:
            return packed
        return torch.where(places[:, None] == NEWLINE, self.newline.to(packed.dtype), packed)

    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], places: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return `mm_encoder_outputs` with the kept features; images without kept tokens are omitted."""
        packed = [features for features in packed if len(features)]
        if not packed:
            return self.with_videos(encoding, {})
        # New, because `generate` expands it in place for beams. It has one field if the LLM reads only features.
        only_features = self.projects_per_token or encoding.outputs is None
        outputs = BaseModelOutputWithPooling() if only_features else copy.copy(encoding.outputs)
        features = torch.cat(packed)[:, None] if self.features_by_tile else packed
        outputs[self.features_field] = features  # sets the attribute, too
        return self.with_videos(encoding, {"image": outputs})

    def complete_inputs(self, encoding: Encoding) -> FeatureInputs:
        """Return `mm_encoder_outputs` with the model's own output object of `get_image_features`."""
        if encoding.repeats > 1:
            return self.features_to_inputs(encoding, encoding.packed)
        return self.with_videos(encoding, {"image": copy_output(encoding.outputs)})

    def with_videos(self, encoding: Encoding, outputs: dict[str, Any]) -> FeatureInputs:
        """Return `mm_encoder_outputs` with the output objects of images and, if the call has any, of videos."""
        if encoding.videos is not None:
            outputs["video"] = copy_output(encoding.videos)
        return FeatureInputs({"mm_encoder_outputs": outputs} if outputs else {})

    def check_select_strategy(self, inputs: Mapping[str, Any]) -> None:
        """Check that the feature selection of a call leaves a grid of tokens.

        Raises:
            ValueError: if the CLS token is kept among the visual tokens, or a patch is removed in place of CLS.
        """
        configured = getattr(self.model.config, "vision_feature_select_strategy", None)
        strategy = inputs.get("vision_feature_select_strategy") or configured
        expected = "default" if self.has_cls else "full"
        if strategy not in (None, expected):
            raise ValueError(
                f"vision_feature_select_strategy={strategy!r} leaves no grid of patches in a tower "
                f"{'with' if self.has_cls else 'without'} a CLS token; set it to {expected!r}"
            )


def pool(kind: str, value: Tensor, token_grid: tuple[int, int], pooling: int, order: str) -> Tensor:
    """Pool a signal from patches to tokens: attention is summed, vectors are averaged.

    Args:
        kind: the kind of the signal.
        value: the signal, `[tiles, heads, patches]` or `[tiles, (heads,) patches, dim]`.
        token_grid: height x width of the tokens of a tile.
        pooling: number of patches along a side of a token.
        order: order of the patches as an einops pattern.

    Returns:
        The signal with tokens in place of patches. Logits are pooled by logsumexp, so that their softmax is summed.
    """
    if pooling == 1:
        return value
    sizes = {"h": token_grid[0], "w": token_grid[1], "p": pooling, "q": pooling}
    if kind == "cls_logits":
        return rearrange(value, f"tiles heads {order} -> tiles heads (h w) (p q)", **sizes).logsumexp(dim=-1)
    if kind in ROW_SIGNALS:
        return reduce(value, f"tiles heads {order} -> tiles heads (h w)", "sum", **sizes)
    heads = "heads " if value.dim() == 4 else ""
    return reduce(value, f"tiles {heads}{order} dim -> tiles {heads}(h w) dim", "mean", **sizes)


def to_uint8_images(pixels: Tensor) -> Tensor:
    """Return normalized pixels as images, uint8 `[tiles, height, width, 3]` on the CPU.

    The values are stretched to the full range, because mean and deviation of the processor are not available here.

    Args:
        pixels: the tiles of an image as the processor returns them, `[tiles, 3, height, width]`.
    """
    pixels = pixels.detach().float()
    low, high = pixels.min(), pixels.max()
    scaled = (pixels - low) / (high - low).clamp(min=1e-6) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _unpack_image(layout: TileGeometry, tokens: VisualTokens, number: int) -> Tensor:
    """Return the visual tokens of one image by tiles, `[tiles, tokens, dim]`."""
    return layout.unpack(tokens.all()[number].detach())


def copy_output(outputs: ModelOutput) -> ModelOutput:
    """Return a shallow copy of an output object with its fields in the same order, which `copy.copy` changes.

    Args:
        outputs: an output object of transformers, which `generate` would expand in place for beams.
    """
    copied = copy.copy(outputs)
    for name in outputs:
        copied.move_to_end(name)
    return copied


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype in which a module computes: the dtype of its first floating-point weight."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
