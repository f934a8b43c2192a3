"""Base class of adapters whose models replace placeholder tokens with the output of `get_image_features`.

`PlaceholderAdapter` encodes images, captures signals, and passes kept features to the model. A family adds class
attributes with the paths of its modules (`TowerAdapter`), and the layout of its images. This class connects functions
of other modules: `_capture` runs the vision side and captures signals; the functions for images, questions, drawing,
resizing and model inputs are next to this file. A family whose model differs overrides methods of the section "Hooks".
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenprune.adapter import Encoding, FeatureInputs, PackedTokens
from tokenprune.capabilities import ReadsQuestion, Resizable, ShowsTiles
from tokenprune.encoder.patches import PatchRecord
from tokenprune.encoder_reducer import EncoderReducer
from tokenprune.geometry import TileGeometry, share_layouts
from tokenprune.image import ALIGNED_SIGNALS, Signal
from tokenprune.models._base.build_images import build_images
from tokenprune.models._base.clip_text import load_text_tower
from tokenprune.models._base.drawing import read_pixel_mean_std, to_uint8_images
from tokenprune.models._base.question import QuestionReader
from tokenprune.models._base.resizing import encode_tiles_at_grid
from tokenprune.models._base.tower import TowerAdapter
from tokenprune.models._base.vision_inputs import (
    copy_output,
    list_feature_parameters,
    select_inputs,
    select_output_options,
    to_floating_dtype,
    wrap_outputs,
)
from tokenprune.models._capture.compiled_tower import CompiledTower
from tokenprune.models._capture.hooks import Tower
from tokenprune.models._capture.patch_reduction import PatchReduction
from tokenprune.models._capture.signals import (
    align_signals,
    base_first_order,
    expand_tokens,
    is_captured,
    list_captured_signals,
    pool_patches,
    split_sequence,
)
from tokenprune.models._capture.truncated_tower import ProjectedTokens, insert_newlines, skipped_layers
from tokenprune.models._capture.vision_run import VisionRun, join_tiles, run_and_capture, run_tower_until
from tokenprune.saliency import resolve_attention_source
from tokenprune.selection import Selection, true_indices


class PlaceholderAdapter(TowerAdapter, ReadsQuestion, Resizable, ShowsTiles):
    """An adapter of a model whose image features fill placeholders in the prompt.

    A family sets the class attributes with the paths of its modules, and implements `layouts`. Encoding, capturing and
    passing on features are the same for all families.
    """

    patch_order: ClassVar[str] = "(h p w q)"
    """Order of the patches of a tile in the tower; token ``(h, w)`` consists of ``p x q`` patches (einops)."""
    base_first: ClassVar[bool] = True
    """Whether the base tile is encoded and packed before the sub-images, or after them."""
    features_by_tile: ClassVar[bool] = False
    """Whether `get_image_features` returns a tensor with a row for each tile instead of a list."""
    features_field: ClassVar[str] = "pooler_output"
    """Field of the output of `get_image_features` that fills the placeholders."""
    projects_per_token: ClassVar[bool] = False
    """Whether, after the tower, a visual token depends on its own patches only. An image then consists of such tokens
    and newline tokens, and `project_patches` computes the tokens."""
    passes_output_options: ClassVar[bool] = False
    """Whether the model's `forward` passes `output_attentions` and `output_hidden_states` to its vision side."""
    patch_steps: ClassVar[frozenset[str]] = frozenset({"drop", "merge"})
    compiled_tower: CompiledTower | None = None
    """The compiled tower that encodes truncated calls; None runs the tower of the model."""

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image of a call."""

    @cached_property
    def image_inputs(self) -> frozenset[str]:
        """The parameters of the model's `get_image_features` and, if it has one, of `get_video_features`.

        The model accepts pixels or features, not both. Videos in a call with images are therefore encoded, too, and
        passed on unreduced.
        """
        return list_feature_parameters(self.model, "image") | list_feature_parameters(self.model, "video")

    @cached_property
    def compared_text_models(self) -> set[str | None]:
        """The text models whose vision tower was compared with that of the model; empty when a strategy is attached."""
        return set()

    # --- Encoding and capture ----------------------------------------------------------------------------------------

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
        """Run the vision side once and return the encoded images with the required signals."""
        self.check_select_strategy(inputs)
        feature_layer, layouts = self.feature_layer(inputs), share_layouts(self.layouts(inputs))
        kinds_by_layer = list_captured_signals(needs, len(self.tower_layers), feature_layer)

        def align(features: Tensor) -> Tensor:
            return load_text_tower(text_model).align(features)

        if any(signal.kind in ALIGNED_SIGNALS for signal in needs):  # if the checkpoint does not fit, raise first
            align(inputs[self.pixels].new_zeros(1, 1, self.tower.config.hidden_size))
            if text_model not in self.compared_text_models:
                self.compared_text_models.add(text_model)
                load_text_tower(text_model).warn_of_another_tower(self.tower)
        positions = None if entering is None else self.select_patches(entering, layouts, inputs)
        patches = self.build_patch_reduction(patch_reducers, layouts, feature_layer, positions)
        truncated = truncated and not (patch_reducers and patches is None)  # all patches: as the unmodified model
        if truncated and self.can_leave_early(inputs, needs):
            run = self.run_tower(inputs, layouts, kinds_by_layer, patches)
        else:
            run = self.run_vision_side(inputs, layouts, kinds_by_layer, truncated, patches)
        signals = {key: self.split_by_image(key[0], parts, layouts, inputs) for key, parts in run.captured.items()}
        signals |= align_signals(signals, kinds_by_layer, align)
        images = build_images(
            layouts,
            run.tokens,
            signals,
            self.drawable_images(inputs, layouts, keep_pixels),
            device=inputs[self.pixels].device,
            layers=len(self.tower_layers),
            feature_layer=feature_layer,
            newline=self.newline,
        )
        videos, arguments = self._encode_videos(inputs), self.vision_arguments(inputs)
        encode_again = partial(self.encode, inputs, keep_pixels=keep_pixels, text_model=text_model, truncated=True)
        return Encoding(
            images,
            run.tokens,
            run.outputs,
            arguments,
            videos,
            is_complete=not truncated and patches is None,
            encode_again=encode_again,
            patches=None if patches is None else self.read_patch_record(patches, layouts, inputs, entering),
        )

    def build_patch_reduction(
        self,
        reducers: Sequence[EncoderReducer],
        layouts: Sequence[TileGeometry],
        feature_layer: int,
        entering: Sequence[Tensor] | None = None,
    ) -> PatchReduction | None:
        """Return the steps of strategies before and inside the tower; None if they drop and merge nothing.

        Args:
            reducers: the strategies, in the order of their stages.
            layouts: the layouts of the images.
            feature_layer: index of the deepest layer whose output the model uses.
            entering: the patches of each image that enter the tower (`select_patches`); None if all enter.
        """
        active = [reducer for reducer in reducers if not self._keeps_all(reducer, layouts, feature_layer)]
        if not active and entering is None:
            return None
        source = resolve_attention_source(active[0].attention if active else "auto", self.provides)
        return PatchReduction(active, self.tower_mlp_name, feature_layer + 1, source, entering)

    def select_patches(
        self, entering: Sequence[Selection], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return the positions of the patches of kept tokens in the sequence of all images, `[kept]` per image.

        Args:
            entering: the selection of each image, with the number of its tokens.
            layouts: the layouts of the images.
            inputs: the model inputs of the call.
        """
        order, patches = self.sequence_order(inputs), self.pooling**2
        sizes = [layout.tokens * patches for layout in layouts]
        numbers = torch.arange(sum(sizes), device=entering[0].kept.device)
        parts = (numbers if order is None else order.to(numbers.device)).split(sizes)
        masks = [
            expand_tokens(selection.kept, layout.token_grid, self.pooling, self.patch_order)
            for selection, layout in zip(entering, layouts, strict=True)
        ]
        counts = [selection.kept_tokens * patches for selection in entering]
        kept = [true_indices(mask, count) for mask, count in zip(masks, counts, strict=True)]
        return [part[index].sort().values for part, index in zip(parts, kept, strict=True)]

    def keeps_all_patches(
        self, patch_reducers: Sequence[EncoderReducer], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> bool:
        """Return whether strategies inside the vision tower drop and merge no patch of a call."""
        feature_layer = self.feature_layer(inputs)
        return all(self._keeps_all(reducer, layouts, feature_layer) for reducer in patch_reducers)

    def count_patches(self, layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]) -> int:
        """Return the patches of a call without reduction, summed over tiles and the layers that run."""
        tokens = sum(layout.tiles * layout.tokens for layout in layouts)
        return tokens * self.pooling**2 * (self.feature_layer(inputs) + 1)

    def _keeps_all(self, reducer: EncoderReducer, layouts: Sequence[TileGeometry], feature_layer: int) -> bool:
        """Return whether a strategy drops and merges no patch of images with the given layouts."""
        sizes = {layout.tokens * self.pooling**2 for layout in layouts}
        return all(reducer.keeps_all(size, feature_layer + 1) for size in sizes)

    def read_patch_record(
        self,
        patches: PatchReduction,
        layouts: Sequence[TileGeometry],
        inputs: Mapping[str, Any],
        entering: Sequence[Selection] | None = None,
    ) -> PatchRecord:
        """Return the patches that remained in the tower, by image.

        Args:
            patches: the steps inside the tower, after it has run.
            layouts: the layouts of the images.
            inputs: the model inputs of the call.
            entering: the selection of each image whose patches entered the tower; None if all entered.
        """
        full, remaining = (sum(numbers) for numbers in zip(*patches.counts, strict=True))
        before = patches.first * full // (patches.layers - patches.first)  # layers before the first step
        full, remaining = full + before, remaining + before
        if self.pooling > 1 or (entering is None and patches.restores):
            return PatchRecord(None if entering is None else [part.kept for part in entering], full, remaining)
        masks = [mask[..., None].float() for mask in patches.read_mask()]
        kept = [mask[..., 0] >= 0.5 for mask in self.split_by_image("vision_features", masks, layouts, inputs)]
        return PatchRecord(kept, full, remaining)

    def run_vision_side(
        self,
        inputs: Mapping[str, Any],
        layouts: Sequence[TileGeometry],
        kinds_by_layer: dict[int, set[str]],
        truncated: bool,
        patches: PatchReduction | None = None,
    ) -> VisionRun:
        """Run the model's own `get_image_features`; if truncated, without the layers after the last required layer."""
        feature_layer = self.feature_layer(inputs)
        skipped: AbstractContextManager[None] = nullcontext()
        arguments = {**self.vision_arguments(inputs), **self._output_options(inputs)}
        if truncated and not is_captured("pooling_attention", kinds_by_layer):
            head = self.tower.head if self.pooling_head is not None else None
            skipped = skipped_layers(self.tower_layers, max([feature_layer, *kinds_by_layer]), head)
        projector = self.projector if is_captured("projector_inputs", kinds_by_layer) else None
        run = partial(self.run_vision, arguments, layouts)
        with skipped:
            parts = replace(self.tower_parts(layouts), patches=patches)
            outputs, captured = run_and_capture(run, parts, kinds_by_layer, feature_layer, projector)
        return VisionRun(PackedTokens(self.split_features(outputs, layouts)), outputs, captured)

    def run_tower(
        self,
        inputs: Mapping[str, Any],
        layouts: Sequence[TileGeometry],
        kinds_by_layer: dict[int, set[str]],
        patches: PatchReduction | None = None,
    ) -> VisionRun:
        """Run the tower up to the last required layer; its outputs are projected on request.

        Args:
            inputs: the model inputs of the call.
            layouts: the layouts of its images.
            kinds_by_layer: kinds of signals per layer index.
            patches: the steps of strategies inside the tower; None without such a strategy.

        Raises:
            ValueError: if the number of tiles differs from the layouts.
        """
        feature_layers, parts = self.feature_layers(inputs), replace(self.tower_parts(layouts), patches=patches)
        pixels = to_floating_dtype(join_tiles(self.split_pixels(inputs, layouts), layouts, self.pixels), self.tower)
        compiled = self.compiled_tower
        run = partial(run_tower_until, self.tower) if compiled is None else compiled.run_until
        hidden, captured = run(pixels, parts, kinds_by_layer, feature_layers)
        if is_captured("projector_inputs", kinds_by_layer):
            captured["projector_inputs", max(feature_layers)] = [self.apply_post_norm(hidden).detach()]
        return VisionRun(ProjectedTokens(self, layouts, hidden), None, captured)

    def _encode_videos(self, inputs: Mapping[str, Any]) -> Any:
        """Return the model's own output object of the videos of a call; None if the call has no videos."""
        names = list_feature_parameters(self.model, "video")
        if inputs.get(self.video_pixels) is None or not names:
            return None
        arguments = {**select_inputs(inputs, names), **self._output_options(inputs)}
        return self.model.base_model.get_video_features(**arguments, return_dict=True)

    def _output_options(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options about outputs that the model's `forward` passes to its vision side."""
        return select_output_options(inputs) if self.passes_output_options else {}

    # --- Hooks: a family overrides them if its model differs ----------------------------------------------------------

    @property
    def newline(self) -> Tensor | None:
        """The learned newline token, `[dim]`; None if the model has no newline token."""
        return None

    def vision_arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the vision inputs of a call that belong to its images."""
        videos = list_feature_parameters(self.model, "video") - list_feature_parameters(self.model, "image")
        return select_inputs(inputs, self.image_inputs - videos)

    def run_vision(self, arguments: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Any:
        """Run the model's own vision side once and return its output object.

        Args:
            arguments: the vision inputs of the call.
            layouts: the layouts of the images.
        """
        return self.model.base_model.get_image_features(**arguments, return_dict=True)

    def split_features(self, outputs: Any, layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Return the visual and newline tokens of each image with nothing dropped, `[length, dim]` each."""
        features = outputs[self.features_field]
        flat = features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))
        return list(flat.split([len(layout.packed) for layout in layouts]))

    def tower_parts(self, layouts: Sequence[TileGeometry]) -> Tower:
        """Return the modules and the sequence layout of the tower from which signals are captured."""
        patches = [layout.tiles * layout.tokens * self.pooling**2 for layout in layouts]
        segments = patches if self.one_sequence else None
        return Tower(self.tower_layers, self.attention_name, self.cls, segments, pooling=self.pooling_head)

    def sequence_order(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the index of each patch in the sequence of the tower, `[patches]`; None if the order is the same."""
        return None

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
            values = split_sequence(kind, captured, layouts, self.pooling, self.sequence_order(inputs))
            return [self._pool(kind, value, layout) for value, layout in zip(values, layouts, strict=True)]
        lengths = tuple(layout.tiles for layout in layouts)
        tiles = captured[0] if len(captured) == 1 else torch.cat(list(captured))
        tiles = tiles if self.base_first else tiles[base_first_order(lengths, tiles.device)]
        if len({layout.token_grid for layout in layouts}) == 1:  # pool the tiles of all images together
            return list(self._pool(kind, tiles, layouts[0]).split(lengths))
        return [self._pool(kind, value, layout) for value, layout in zip(tiles.split(lengths), layouts, strict=True)]

    def _pool(self, kind: str, value: Tensor, layout: TileGeometry) -> Tensor:
        return pool_patches(kind, value, layout.token_grid, self.pooling, self.patch_order)

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

    def split_pixels(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the pixels of each image, `[tiles, 3, height, width]` each; padding tiles can follow."""
        pixels = inputs[self.pixels]
        return pixels if pixels.dim() == 5 else torch.split(pixels, [layout.tiles for layout in layouts])

    def drawable_images(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry], number: int) -> list[Tensor]:
        """Return the first `number` images for drawing, base tile first, uint8 `[tiles, height, width, 3]` each."""
        return [to_uint8_images(tiles) for tiles in self.read_tiles(inputs, layouts)[:number]] if number else []

    def features_to_inputs(
        self, encoding: Encoding, packed: list[Tensor], positions: Sequence[Tensor] | None = None
    ) -> FeatureInputs:
        """Return `mm_encoder_outputs` with the kept features; images without kept tokens are omitted."""
        packed = [features for features in packed if len(features)]
        if not packed:
            return wrap_outputs(None, encoding.videos)
        # New, because `generate` expands it in place for beams. It has one field if the LLM reads only features.
        only_features = self.projects_per_token or encoding.outputs is None
        outputs = BaseModelOutputWithPooling() if only_features else copy.copy(encoding.outputs)
        features = torch.cat(packed)[:, None] if self.features_by_tile else packed
        outputs[self.features_field] = features  # sets the attribute, too
        return wrap_outputs(outputs, encoding.videos)

    def complete_inputs(self, encoding: Encoding) -> FeatureInputs:
        """Return `mm_encoder_outputs` with the model's own output object of `get_image_features`."""
        if encoding.repeats > 1:
            return self.features_to_inputs(encoding, encoding.packed)
        return wrap_outputs(copy_output(encoding.outputs), encoding.videos)

    # --- Capabilities ------------------------------------------------------------------------------------------------

    @cached_property
    def question_reader(self) -> QuestionReader:
        """Extracts questions from prompts, with the tokenizer of the model."""
        return QuestionReader(self.model, self.image_token_id)

    def embed_question(self, text: str, text_model: str | None) -> Mapping[str, Tensor]:
        """Return the embeddings of a question by kind, in the space shared by the text model and the vision tower."""
        return load_text_tower(text_model).embed(text, self.model.device)

    def read_questions(self, input_ids: Tensor, attention_mask: Tensor | None, tokenizer: Any = None) -> list[str]:
        """Return the question of the user in each prompt row."""
        return self.question_reader.read(input_ids, attention_mask, tokenizer)

    def read_tiles(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Return the pixels of each image, `[tiles, 3, height, width]` each, base tile first."""
        images = zip(self.split_pixels(inputs, layouts), layouts, strict=True)
        unpadded = [tiles[: layout.tiles] for tiles, layout in images]
        return unpadded if self.base_first else [tiles.roll(1, 0) for tiles in unpadded]

    def pixel_mean_std(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and standard deviation of the colors, read from the configuration of the image processor."""
        return read_pixel_mean_std(self.model)

    def build_unencoded(self, inputs: Mapping[str, Any], keep_pixels: int = 0) -> Encoding:
        """Return an encoding with layouts and no features."""
        self.check_select_strategy(inputs)
        layouts, device = share_layouts(self.layouts(inputs)), inputs[self.pixels].device
        tokens = PackedTokens([torch.zeros(len(layout.packed), 0, device=device) for layout in layouts])
        images = build_images(
            layouts,
            tokens,
            {},
            self.drawable_images(inputs, layouts, keep_pixels),
            device=device,
            layers=len(self.tower_layers),
            feature_layer=self.feature_layer(inputs),
        )
        return Encoding(images, tokens, inputs=self.vision_arguments(inputs), videos=self._encode_videos(inputs))

    def encode_resized(self, inputs: Mapping[str, Any], grids: Sequence[tuple[int, int] | None]) -> list[Tensor]:
        """Return the visual and newline tokens of shrunk images, from interpolated position embeddings."""
        layouts, setting = self.layouts(inputs), inputs.get("vision_feature_layer")
        setting = self.model.config.vision_feature_layer if setting is None else setting
        images, width = self.split_pixels(inputs, layouts), self.model.config.get_text_config().hidden_size
        packed = []
        for layout, grid, tiles in zip(layouts, grids, images, strict=True):
            if grid is None:
                packed.append(torch.zeros(0, width, device=tiles.device))
                continue
            hidden = encode_tiles_at_grid(self.tower, tiles[: layout.tiles], grid, setting, int(self.has_cls))
            features, index = self.projector(hidden).flatten(0, 1), layout.resized(grid)[0].packed
            packed.append(insert_newlines(features, index.to(features.device), self.newline))
        return packed
