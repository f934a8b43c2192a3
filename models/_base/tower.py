"""Base class of adapters of models with a vision tower: the modules and dimensions of a model, read from its paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tokenprune.adapter import Adapter, LLMShape
from tokenprune.capabilities import DecoderModules, HasDecoder, ProjectsMixtures
from tokenprune.decoder.trace import LayerTrace
from tokenprune.image import ALIGNED_SIGNALS, LLM_SIGNALS, STEP_SIGNALS, TEXT_SIGNALS
from tokenprune.models._base.feature_layers import check_select_strategy, resolve_feature_layers
from tokenprune.models._base.linear_weights import linear_weights
from tokenprune.models._base.llm_shape import read_llm_shape
from tokenprune.models._base.vision_inputs import to_floating_dtype
from tokenprune.models._capture.decoder import DecoderTracer, ask_layer


class TowerAdapter(Adapter, ProjectsMixtures):
    """An adapter of a model with a vision tower and a projector; a family sets the paths of its modules."""

    tower_path: ClassVar[str] = "vision_tower"
    """Path of the vision tower in the base model."""
    layers_path: ClassVar[str] = "encoder.layers"
    """Path of the encoder layers in the tower."""
    attention_name: ClassVar[str] = "self_attn"
    """Name of the attention module in a layer of the tower; the module uses transformers' `AttentionInterface`."""
    tower_mlp_name: ClassVar[str] = "mlp"
    """Name of the MLP in a layer of the tower."""
    projector_path: ClassVar[str | None] = "multi_modal_projector"
    """Path in the base model of the module that maps each visual token independently; None if there is none."""
    language_model_path: ClassVar[str] = "language_model"
    """Path of the decoder in the base model."""
    llm_attention_name: ClassVar[str] = "self_attn"
    """Name of the attention module in a layer of the decoder; layers without attention lack it."""
    llm_mlp_name: ClassVar[str] = "mlp"
    """Name of the MLP in a layer of the decoder."""
    rotary_path: ClassVar[str | None] = "rotary_emb"
    """Path in the decoder of the module that computes position embeddings; None if there is none."""
    final_norm_path: ClassVar[str | None] = "norm"
    """Path in the decoder of the norm after the last layer; None if there is none."""
    pooling_config_key: ClassVar[str | None] = None
    """Config entry with the number of patches along a side of one visual token; None if a token is one patch."""
    post_norm_path: ClassVar[str | None] = None
    """Path in the tower of the norm that the model applies to the layer outputs; None if it uses them unnormalized."""
    one_sequence: ClassVar[bool] = False
    """Whether the tower runs over all images as one sequence; each image is then one tile of its own size."""
    resizable: ClassVar[bool] = False
    """Whether the tower accepts tiles of other sizes (`interpolate_pos_encoding`)."""

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
        return attrgetter(self.layers_path)(self.tower)

    @cached_property
    def projector(self) -> Any:
        """The module that maps features of the vision tower to visual tokens."""
        return attrgetter(self.projector_path or "")(self.model.base_model)

    @cached_property
    def decoder(self) -> Any:
        """The module with the decoder layers."""
        return attrgetter(self.language_model_path)(self.model.base_model)

    @cached_property
    def decoder_modules(self) -> DecoderModules:
        """The modules of the LLM."""
        rotary, norm = (
            None if path is None else attrgetter(path)(self.decoder)
            for path in (self.rotary_path, self.final_norm_path)
        )
        return DecoderModules(
            decoder=self.decoder,
            layers=self.decoder.layers,
            count_weights=linear_weights,
            attention=self.llm_attention_name,
            mlp=self.llm_mlp_name,
            rotary=rotary,
            norm=norm,
            adds_features_until=self.adds_features_until,
        )

    def trace_layers(self, kinds_by_layer: Mapping[int, frozenset[str]]) -> DecoderTracer:
        """Return a tracer of layers of the LLM.

        Args:
            kinds_by_layer: kinds of signals by layer index.
        """
        return DecoderTracer(self.decoder_modules, kinds_by_layer)

    def ask_layer(
        self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], rotated: bool = True
    ) -> LayerTrace:
        """Return the queries and keys that a layer of the LLM would compute on its inputs.

        Args:
            index: index of the layer.
            args: positional inputs of the layer.
            kwargs: keyword inputs of the layer.
            rotated: whether position embeddings are applied.
        """
        return ask_layer(self.decoder_modules, index, args, kwargs, rotated)

    @property
    def adds_features_until(self) -> int:
        """Number of first layers of the decoder whose inputs the model adds features to by prompt position."""
        return 0

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

    @cached_property
    def token_grid(self) -> tuple[int, int]:
        """Height x width of the visual tokens of one tile."""
        config = self.tower.config
        sizes = (config.image_size, config.patch_size)
        image, patch = (size[0] if isinstance(size, (list, tuple)) else size for size in sizes)
        side = image // patch // self.pooling
        return side, side

    @property
    def provides(self) -> frozenset[str]:
        """Kinds of signals that this model provides."""
        kinds = {"received_attention", "keys", "vision_features"}
        if self.projector_path is not None:
            kinds |= {"projector_inputs"}
        if self.resizable:
            kinds |= {"resolution"}
        if self.patch_steps:
            kinds |= STEP_SIGNALS
        if self.one_sequence and "drop" in self.patch_steps:
            kinds |= {"patch_removal"}
        if self.has_cls:
            kinds |= {"cls_attention", "cls_logits", "joint_attention", "cls_features"}
        if self.pooling_head is not None:
            kinds |= {"pooling_attention"}
        if self.tower.config.model_type == "clip_vision_model":
            kinds |= ALIGNED_SIGNALS | TEXT_SIGNALS
        if isinstance(self, HasDecoder):
            kinds |= LLM_SIGNALS
        return frozenset(kinds)

    @property
    def image_token_id(self) -> int:
        """Token id of the image placeholder."""
        return self.model.config.image_token_id

    @cached_property
    def llm(self) -> LLMShape:
        """The shape of the language model."""
        return read_llm_shape(self.model, self.decoder.layers)

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
        setting = inputs.get("vision_feature_layer")
        setting = getattr(self.model.config, "vision_feature_layer", -1) if setting is None else setting
        return resolve_feature_layers(setting, len(self.tower_layers))

    def apply_post_norm(self, patches: Tensor) -> Tensor:
        """Return outputs of the feature layers after the norm of the tower, if the model applies one."""
        path = self.post_norm_path
        return patches if path is None else torch.as_tensor(attrgetter(path)(self.tower)(patches))

    def check_select_strategy(self, inputs: Mapping[str, Any]) -> None:
        """Check that the feature selection of a call leaves a grid of tokens.

        Raises:
            ValueError: if the CLS token is kept among the visual tokens, or a patch is removed in place of CLS.
        """
        configured = getattr(self.model.config, "vision_feature_select_strategy", None)
        check_select_strategy(inputs.get("vision_feature_select_strategy") or configured, self.has_cls)

    def project(self, features: Tensor) -> Tensor:
        """Return the projector's output, `[kept, width]` to `[kept, dim]`."""
        return self.projector(to_floating_dtype(features, self.projector)[None])[0]

    def project_patches(self, patches: Tensor) -> Tensor:
        """Return the visual tokens of the given patches, `[tokens, dim]`.

        Args:
            patches: outputs of the feature layers for the patches of each token, row by row,
                `[tokens, patches, width]`.
        """
        return self.projector(self.apply_post_norm(patches).transpose(0, 1))[0]

    def project_tiles(self, hidden: Tensor, patches: Tensor) -> Tensor:
        """Return all visual tokens of the given tiles, `[tiles * tokens, dim]`.

        Args:
            hidden: outputs of the feature layers, without CLS, `[tiles, sequence, width]`.
            patches: indices of the patches of each token in the sequence, row by row, `[tokens, patches]`.
        """
        return self.project_patches(hidden[:, patches].flatten(0, 1))
