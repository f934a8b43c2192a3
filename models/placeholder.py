"""What the adapters share whose model replaces placeholder tokens by the output of `get_image_features`."""

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

from tokenprune.adapter import Adapter, Encoding, LLMShape
from tokenprune.image import (
    ALIGNED_FROM,
    ALIGNED_SIGNALS,
    CLS_SIGNALS,
    ROW_SIGNALS,
    SEPARATOR,
    TEXT_SIGNALS,
    EncodedImage,
    LazyImage,
    Signal,
    TileGeometry,
    token_dim,
)
from tokenprune.models.example import EXAMPLE_PAD, EXAMPLE_TEXT
from tokenprune.models.probe import Tower, instead, probe, wanted_layers
from tokenprune.models.staged import Pending, StagedEncoding, TowerRun
from tokenprune.models.text import example_text_model, question_in, text_tower


class PlaceholderAdapter(Adapter):
    """An adapter of a model whose image features fill placeholders in the prompt.

    A family says where its parts are and how it lays out an image: class attributes, and `layouts`. Encoding, capturing
    and handing over are the same for all.
    """

    tower_at: ClassVar[str] = "vision_tower"
    """Where the vision tower is in the base model."""
    layers_at: ClassVar[str] = "encoder.layers"
    """Where its layers are in the tower."""
    attention_at: ClassVar[str] = "self_attn"
    """Name of the attention module in a layer of the tower; it asks transformers' `AttentionInterface`."""
    projector_at: ClassVar[str | None] = "multi_modal_projector"
    """Where the module is in the base model that maps each visual token by itself; None if there is none such."""
    language_model_at: ClassVar[str] = "language_model"
    """Where the decoder is in the base model."""
    pooling_in: ClassVar[str | None] = None
    """Name of the number in the config that says how many patches along a side become one visual token; None: one."""
    patch_order: ClassVar[str] = "(h p w q)"
    """How the patches of a tile are ordered in the tower; token ``(h, w)`` is made of ``p x q`` patches (einops)."""
    base_first: ClassVar[bool] = True
    """Whether the base tile is encoded and packed before the sub-images, or after them."""
    one_sequence: ClassVar[bool] = False
    """Whether the tower runs over all images as one sequence; each is then one tile of its own size."""
    features_by_tile: ClassVar[bool] = False
    """Whether `get_image_features` returns a tensor with a row for each tile instead of a list."""
    features_in: ClassVar[str] = "pooler_output"
    """Which field of what it returns fills the placeholders."""
    resizable: ClassVar[bool] = False
    """Whether the tower takes tiles of other sizes (`interpolate_pos_encoding`)."""
    norm_at: ClassVar[str | None] = None
    """Where the norm is in the tower that its outputs pass before they are used; None if the model takes them as the
    layer puts them out."""
    staged: ClassVar[bool] = False
    """Whether images can be encoded only as far as somebody reads: all layers of the tower are given the same beside
    the hidden states, the projector maps each visual token by itself, and an image is nothing but such tokens and
    newlines."""

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Any]) -> list[TileGeometry]:
        """Return the layout of each image of a call."""

    @abstractmethod
    def example_pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the vision inputs of pictures with random pixels; the same pixels for the same size."""

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Whether the model is of this family, by class name along its bases."""
        return any(base.__name__ == cls.model_class for base in type(model).__mro__)

    def example_inputs(self, rows: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
        """Return inputs with random pixels and as many placeholders as the layouts say."""
        sizes = list(dict.fromkeys(size for row in rows for size in row))
        layouts = zip(sizes, self.layouts(self.example_pixels(sizes)), strict=True)
        return self.example_prompts(rows, {size: [self.image_token_id] * len(one.packed) for size, one in layouts})

    def example_prompts(
        self, rows: Sequence[Sequence[tuple[int, int]]], images: Mapping[tuple[int, int], Sequence[int]]
    ) -> dict[str, Any]:
        """Return inputs with random pixels, left-padded.

        Args:
            rows: for each prompt, height x width of its pictures in pixels.
            images: the ids that stand for a picture of each size.
        """
        prompts = [[1, *(token for size in row for token in [*images[size], *EXAMPLE_TEXT])] for row in rows]
        width = max(map(len, prompts))
        ids = torch.tensor([[EXAMPLE_PAD] * (width - len(prompt)) + prompt for prompt in prompts])
        vision = self.example_pixels([size for row in rows for size in row])
        return {"input_ids": ids, "attention_mask": (ids != EXAMPLE_PAD).long(), **vision}

    @cached_property
    def tower(self) -> Any:
        """The vision tower."""
        return attrgetter(self.tower_at)(self.model.base_model)

    @cached_property
    def tower_layers(self) -> Sequence[nn.Module]:
        """The encoder layers of the vision tower."""
        layers: Sequence[nn.Module] = attrgetter(self.layers_at)(self.tower)
        return layers

    @cached_property
    def cls(self) -> Literal["none", "first", "last"]:
        """Where the CLS token stands in the sequence of the tower."""
        embeddings = getattr(self.tower, "embeddings", None)
        return "first" if any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token")) else "none"

    @property
    def has_cls(self) -> bool:
        """Whether the tower has a CLS token."""
        return self.cls != "none"

    @cached_property
    def pooling_head(self) -> nn.MultiheadAttention | None:
        """The attention of SigLIP's pooling head; None if the checkpoint has none."""
        head = getattr(getattr(self.tower, "head", None), "attention", None)
        return head if isinstance(head, nn.MultiheadAttention) else None

    @cached_property
    def pooling(self) -> int:
        """Patches along a side that become one visual token."""
        return 1 if self.pooling_in is None else int(getattr(self.model.config, self.pooling_in))

    @property
    def provides(self) -> frozenset[str]:
        """Kinds of signals that this model can give."""
        kinds = {"received_attention", "keys", "vision_features"}
        if self.projector_at is not None:
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
        """The parameters of the model's own `get_image_features`."""
        return frozenset(inspect.signature(self.model.base_model.get_image_features).parameters) - {"kwargs"}

    @cached_property
    def token_grid(self) -> tuple[int, int]:
        """Height x width of the visual tokens of one tile."""
        config = self.tower.config
        image, patch = (
            one[0] if isinstance(one, (list, tuple)) else one for one in (config.image_size, config.patch_size)
        )
        side = image // patch // self.pooling
        return side, side

    @cached_property
    def decoder(self) -> Any:
        """The module with the decoder layers."""
        return attrgetter(self.language_model_at)(self.model.base_model)

    @cached_property
    def llm(self) -> LLMShape:
        """The shape of the language model."""
        config = self.model.config.get_text_config()
        linear = [m for m in self.decoder.layers.modules() if isinstance(m, nn.Linear)]
        return LLMShape(
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            linear_parameters=sum(m.in_features * m.out_features for m in linear),
            head_parameters=config.hidden_size * config.vocab_size,
            element_bytes=self.model.dtype.itemsize,
        )

    def feature_layer(self, inputs: Mapping[str, Any]) -> int:
        """Return the index of the (deepest) layer whose output the model uses; the last one unless the config says.

        Raises:
            ValueError: if the model uses the embeddings, which no layer puts out.
        """
        return max(self.feature_layers(inputs))

    def feature_layers(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the indices of all layers whose outputs the model uses, side by side.

        Raises:
            ValueError: if the model uses the embeddings alone, which no layer puts out.
        """
        chosen: Any = inputs.get("vision_feature_layer")
        chosen = getattr(self.model.config, "vision_feature_layer", -1) if chosen is None else chosen
        depth = len(self.tower_layers)
        indices = [
            depth + one if one < 0 else one - 1 for one in (chosen if isinstance(chosen, (list, tuple)) else [chosen])
        ]
        if not 0 <= max(indices) < depth:
            raise ValueError(f"vision_feature_layer={chosen!r} is no output of the {depth} layers of the vision tower")
        return indices

    @cached_property
    def projector(self) -> Any:
        """What turns features of the vision tower into visual tokens."""
        return attrgetter(self.projector_at or "")(self.model.base_model)

    def project(self, features: Tensor) -> Tensor:
        """Return the projector's output, `[kept, width]` to `[kept, dim]`."""
        projected: Tensor = self.projector(features.to(self.model.dtype)[None])[0]
        return projected

    def embed_question(self, text: str, text_model: str | None) -> Mapping[str, Tensor]:
        """Return a question in the space that the text model shares with the vision tower."""
        return text_tower(text_model).embed(text, self.model.device)

    def example_text_model(self) -> str:
        """Return the folder of a tiny CLIP checkpoint whose vision tower is as wide as that of the model."""
        return example_text_model(self.tower.config.hidden_size)

    def read_questions(self, input_ids: Tensor, attention_mask: Tensor | None, tokenizer: Any = None) -> list[str]:
        """Return what the user asks in each prompt row.

        Raises:
            ValueError: if no tokenizer was given and the model does not say which folder or hub id it comes from.
        """
        tokenizer = self._own_tokenizer if tokenizer is None else getattr(tokenizer, "tokenizer", tokenizer)
        special = [*tokenizer.all_special_tokens, tokenizer.decode([self.image_token_id])]
        real = input_ids != self.image_token_id
        real = real if attention_mask is None else real & attention_mask.bool()
        return [question_in(tokenizer.decode(ids[keep]), special) for ids, keep in zip(input_ids, real, strict=True)]

    @cached_property
    def _own_tokenizer(self) -> Any:
        name = getattr(self.model, "name_or_path", "")
        if not name:
            raise ValueError(
                "the question cannot be read from the prompt: the model was not loaded from a folder or hub id with a "
                "tokenizer. Attach with reducer(model, tokenizer=processor.tokenizer) or question=..."
            )
        return AutoTokenizer.from_pretrained(name)

    def encode(
        self, inputs: Mapping[str, Any], needs: Sequence[Signal], pictures: int = 0, text_model: str | None = None
    ) -> Encoding:
        """Run the model's own `get_image_features` once, with the needed layers under the probe."""
        self.check_select_strategy(inputs)
        feature_layer, layouts = self.feature_layer(inputs), self.layouts(inputs)
        arguments = self.vision_arguments(inputs)
        wanted = self.wanted(needs, feature_layer)
        projected = any("projector_inputs" in kinds for kinds in wanted.values())
        with (
            self.needed_part(wanted, feature_layer),
            probe(self.tower_parts(layouts), wanted) as captured,
            self.projector_probe(projected) as before,
        ):
            outputs = self.run_vision(arguments, layouts)
        if projected:
            captured["projector_inputs", feature_layer] = before
        signals = {key: self.by_image(key[0], found, layouts, inputs) for key, found in captured.items()}
        for index, kinds in wanted.items():
            for aligned in kinds & ALIGNED_SIGNALS:
                sources = signals[ALIGNED_FROM[aligned], index]
                signals[aligned, index] = [text_tower(text_model).align(source) for source in sources]
        packed = self.features(outputs, layouts)
        shown = self.pictures(inputs, layouts, pictures)
        images: list[EncodedImage] = [
            LazyImage(
                geometry=layout,
                make=partial(layout.unpack, packed[number].detach()),
                at=packed[number].device,
                signals={key: found[number] for key, found in signals.items()},
                layers=len(self.tower_layers),
                feature_layer=feature_layer,
                newline=self.newline,
                pixels=shown[number] if number < len(shown) else None,
            )
            for number, layout in enumerate(layouts)
        ]
        return Encoding(images, packed, outputs, arguments)

    def wanted(self, needs: Sequence[Signal], feature_layer: int) -> dict[int, set[str]]:
        """Return the kinds of signals to capture in each layer, and what aligned ones are made from."""
        wanted = wanted_layers(needs, len(self.tower_layers), feature_layer)
        for kinds in wanted.values():
            kinds |= {source for aligned, source in ALIGNED_FROM.items() if aligned in kinds}
        return wanted

    def encode_staged(
        self, inputs: Mapping[str, Any], needs: Sequence[Signal], pictures: int = 0, text_model: str | None = None
    ) -> Encoding:
        """Encode images as far as somebody reads, where the family, the call and the needed signals allow it."""
        if not self.can_stage(inputs, needs):
            return self.encode(inputs, needs, pictures, text_model)
        self.check_select_strategy(inputs)
        return self.stage(inputs, self.layouts(inputs), needs, pictures, text_model)

    def stage(
        self,
        inputs: Mapping[str, Any],
        layouts: Sequence[TileGeometry],
        needs: Sequence[Signal],
        pictures: int = 0,
        text_model: str | None = None,
    ) -> StagedEncoding:
        """Return images of which nothing is encoded yet; see `encode_staged`.

        Args:
            inputs: the model inputs of the call.
            layouts: the layouts of its images.
            needs: the signals to capture.
            pictures: how many of the images keep their pixels for drawing.
            text_model: the CLIP checkpoint whose projections align features with text.

        Raises:
            ValueError: if there are not as many tiles as the layouts say, or the text model does not fit.
        """
        at, found = self.feature_layers(inputs), self.tiles_of(inputs, layouts)
        tiles = [one[: layout.tiles] for one, layout in zip(found, layouts, strict=False)]
        if len(found) != len(layouts) or any(len(a) != b.tiles for a, b in zip(tiles, layouts, strict=True)):
            raise ValueError(
                f"{self.pixels} hold {len(found)} pictures of {list(map(len, tiles))} tiles, but their layouts have "
                f"{[one.tiles for one in layouts]}; make the inputs with the processor that belongs to the model"
            )
        pixels = torch.cat(tiles).to(self.model.dtype)

        def start(active: Tensor | None) -> None:
            self.tower(pixels if active is None else pixels[active])

        def align(features: Tensor) -> Tensor:
            return text_tower(text_model).align(features)

        if any(signal.kind in ALIGNED_SIGNALS for signal in needs):  # a model that does not fit is refused first
            align(pixels.new_zeros(1, 1, self.tower.config.hidden_size))
        of_all = self.wanted([signal for signal in needs if signal.tiles == "all"], max(at))
        run = TowerRun(self.tower_parts(layouts), start, len(pixels), self.wanted(needs, max(at)), at, of_all)
        return StagedEncoding(Pending(self, inputs, layouts, run, align), self.pictures(inputs, layouts, pictures))

    def can_stage(self, inputs: Mapping[str, Any], needs: Sequence[Signal]) -> bool:
        """Return whether the images of a call can be encoded in stages.

        Not while gradients are kept for training, which may recompute layers; not where weights are moved to the device
        module by module; and not for signals of the pooling head, or of a projector that pools.
        """
        kinds = {signal.kind for signal in needs}
        return (
            self.staged
            and not (torch.is_grad_enabled() and self.model.training)
            and len(set((getattr(self.model, "hf_device_map", None) or {"": 0}).values())) == 1
            and "pooling_attention" not in kinds
            and not ("projector_inputs" in kinds and self.pooling > 1)
            and min(self.feature_layers(inputs)) >= 0
        )

    def visual_tokens(self, patches: Tensor) -> Tensor:
        """Return the visual tokens that are made of some patches, `[tokens, dim]`.

        Args:
            patches: what the feature layers put out for the patches of each token, row by row, `[tokens, patches,
                width]`.
        """
        tokens: Tensor = self.projector(self.normed(patches).transpose(0, 1))[0]
        return tokens

    def all_visual_tokens(self, hidden: Tensor, patches: Tensor) -> Tensor:
        """Return all visual tokens of some tiles, `[tiles * tokens, dim]`.

        Args:
            hidden: what the feature layers put out, without CLS, `[tiles, sequence, width]`.
            patches: the places of the patches of each token, row by row, `[tokens, patches]`.
        """
        return self.visual_tokens(hidden[:, patches].flatten(0, 1))

    def normed(self, patches: Tensor) -> Tensor:
        """Return outputs of the feature layers as the model uses them."""
        return patches if self.norm_at is None else torch.as_tensor(attrgetter(self.norm_at)(self.tower)(patches))

    def vision_arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the vision inputs that a call brings."""
        return {name: inputs[name] for name in self.image_inputs if inputs.get(name) is not None}

    def run_vision(self, arguments: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Any:
        """Run the model's own vision side once and return its output object.

        Args:
            arguments: the vision inputs of the call.
            layouts: the layouts of the images.
        """
        return self.model.base_model.get_image_features(**arguments, return_dict=True)

    def tower_parts(self, layouts: Sequence[TileGeometry]) -> Tower:
        """Return where signals are found in the tower while it encodes some images."""
        patches = [layout.tiles * layout.tokens * self.pooling**2 for layout in layouts]
        segments = patches if self.one_sequence else None
        return Tower(self.tower_layers, self.attention_at, self.cls, segments, pooling=self.pooling_head)

    @contextmanager
    def needed_part(self, wanted: Mapping[int, set[str]], feature_layer: int) -> Iterator[None]:
        """Let layers behind the last needed one, and a pooling head that nobody reads, do nothing in the block.

        Args:
            wanted: kinds of signals per layer index.
            feature_layer: index of the layer whose output the model uses.
        """
        read_head = any("pooling_attention" in kinds for kinds in wanted.values())
        last = len(self.tower_layers) if read_head or not self.staged else max([feature_layer, *wanted])
        with ExitStack() as undo:
            for layer in self.tower_layers[last + 1 :]:
                undo.enter_context(instead(layer, lambda hidden, *args, **kwargs: hidden))
            if self.pooling_head is not None and not read_head:
                undo.enter_context(instead(self.tower.head, lambda hidden_state, **kwargs: hidden_state[:, 0]))
            yield

    @contextmanager
    def projector_probe(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Capture what the projector is given while the block runs, if that is wanted."""
        parts: list[Tensor] = []
        if not wanted:
            yield parts
            return
        hook = self.projector.register_forward_pre_hook(lambda module, args: parts.append(args[0].detach()))
        try:
            yield parts
        finally:
            hook.remove()

    def by_image(
        self, kind: str, captured: Sequence[Tensor], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return a captured signal by images, with the base tile first and patches pooled to tokens.

        Args:
            kind: the kind of the signal.
            captured: what the probe found, tiles along the first dimension.
            layouts: the layouts of the images.
            inputs: the model inputs of the call.
        """
        if not layouts:
            return []
        if self.one_sequence:
            whole = self.from_sequence(kind, captured, layouts, inputs)
        else:
            whole = list(torch.cat(list(captured)).split([one.tiles for one in layouts]))
        out = []
        for value, layout in zip(whole, layouts, strict=True):
            ordered = value if self.base_first else value.roll(1, 0)
            pooled = kind not in CLS_SIGNALS and kind != "projector_inputs"
            out.append(pool(kind, ordered, layout.token_grid, self.pooling, self.patch_order) if pooled else ordered)
        return out

    def from_sequence(
        self, kind: str, captured: Sequence[Tensor], layouts: Sequence[TileGeometry], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return a signal by images where the tower runs over all of them as one sequence, `[1, ...]` each.

        Args:
            kind: the kind of the signal.
            captured: stretches of the sequence, whatever their lengths.
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
        """Return where in the one sequence of the tower each patch stands, `[patches]`; None if none is moved."""
        return None

    def features(self, outputs: Any, layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Return each image as it would enter the LLM, `[length, dim]` each."""
        found = outputs[self.features_in]
        flat = found.flatten(0, 1) if isinstance(found, Tensor) else torch.cat(list(found))
        return list(flat.split([len(layout.packed) for layout in layouts]))

    def pictures(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry], number: int) -> list[Tensor]:
        """Return the first images as pictures for drawing, base tile first, `[tiles, height, width, 3]` each."""
        return [as_pictures(one) for one in self.tiles(inputs, layouts)[:number]] if number else []

    def unencoded(self, inputs: Mapping[str, Any], pictures: int = 0) -> Encoding:
        """Return an encoding with layouts and no features."""
        self.check_select_strategy(inputs)
        arguments = self.vision_arguments(inputs)
        device, layouts = inputs[self.pixels].device, self.layouts(inputs)
        shown = self.pictures(inputs, layouts, pictures)
        images = [
            EncodedImage(
                geometry=layout,
                features=torch.zeros(layout.tiles, layout.tokens, 0, device=device),
                layers=len(self.tower_layers),
                feature_layer=self.feature_layer(inputs),
                pixels=shown[number] if number < len(shown) else None,
            )
            for number, layout in enumerate(layouts)
        ]
        return Encoding(images, [torch.zeros(len(one.packed), 0, device=device) for one in layouts], None, arguments)

    def tiles(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> list[Tensor]:
        """Return the pixels of each image, `[tiles, 3, height, width]` each, base tile first."""
        found = [one[: layout.tiles] for one, layout in zip(self.tiles_of(inputs, layouts), layouts, strict=True)]
        return found if self.base_first else [one.roll(1, 0) for one in found]

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and standard deviation of the colours, as the processor's own file says them.

        Raises:
            ValueError: if there is no such file, or it does not say.
        """
        name = getattr(self.model, "name_or_path", "")
        try:
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"how the pictures of {self.model_class} are normalised cannot be read from {name!r} "
                f"({' '.join(str(error).split())[:200]}); give image_mean and image_std of its image processor"
            ) from error
        if not getattr(processor, "do_normalize", True):
            return [0.0] * 3, [1.0] * 3
        return processor.image_mean, processor.image_std

    def tiles_of(self, inputs: Mapping[str, Any], layouts: Sequence[TileGeometry]) -> Sequence[Tensor]:
        """Return the pixels of each image, `[tiles, 3, height, width]` each; padding may follow."""
        pixels = inputs[self.pixels]
        return pixels if pixels.dim() == 5 else torch.split(pixels, [layout.tiles for layout in layouts])

    @property
    def newline(self) -> Tensor | None:
        """The learned newline token, `[dim]`; None if the model has none."""
        return None

    def encode_resized(self, inputs: Mapping[str, Any], grids: Sequence[tuple[int, int] | None]) -> list[Tensor]:
        """Shrink the pixels of every tile and run the vision tower with interpolated position embeddings."""
        layouts, chosen = self.layouts(inputs), inputs.get("vision_feature_layer")
        chosen = self.model.config.vision_feature_layer if chosen is None else chosen
        patch, packed = self.tower.config.patch_size, []
        for layout, grid, tiles in zip(layouts, grids, self.tiles_of(inputs, layouts), strict=True):
            if grid is None:
                packed.append(torch.zeros(0, self.model.config.get_text_config().hidden_size, device=tiles.device))
                continue
            size = (grid[0] * patch, grid[1] * patch)
            small = F.interpolate(tiles[: layout.tiles].float(), size, mode="bicubic", antialias=True)
            hidden = self.tower(
                small.to(self.model.dtype), interpolate_pos_encoding=True, output_hidden_states=True
            ).hidden_states
            wanted = [hidden[index] for index in (chosen if isinstance(chosen, (list, tuple)) else [chosen])]
            features = self.projector(torch.cat(wanted, dim=-1)[:, int(self.has_cls) :]).flatten(0, 1)
            packed.append(self.laid_out(features, layout.resized(grid)[0].packed.to(features.device)))
        return packed

    def laid_out(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Return visual tokens and newlines as they enter the LLM, `[length, dim]`.

        Args:
            tokens: the visual tokens, `[some, dim]`.
            places: which of them stands at each position, or `SEPARATOR` for a newline, `[length]`.
        """
        laid = tokens[places.clamp(min=0)]
        if self.newline is None:
            return laid
        return torch.where(places[:, None] == SEPARATOR, self.newline.to(laid.dtype), laid)

    def hand_over(
        self, encoding: Encoding, packed: list[Tensor], places: Sequence[Tensor] | None = None
    ) -> dict[str, Any]:
        """Return `mm_encoder_outputs` with the kept features; images of which nothing is left are left out."""
        packed = [features for features in packed if len(features)]
        if not packed:
            return {}
        # A new object: generate expands it in place for beams. Where nothing but the features is read, nothing else is
        # kept alive through the prefill.
        alone = self.staged or encoding.outputs is None
        outputs = BaseModelOutputWithPooling() if alone else copy.copy(encoding.outputs)
        features = torch.cat(packed)[:, None] if self.features_by_tile else packed
        outputs[self.features_in] = features  # sets the attribute, too
        return {"mm_encoder_outputs": {"image": outputs}}

    def check_select_strategy(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a feature selection under which tokens do not form a grid.

        Raises:
            ValueError: if the CLS token is kept among the visual tokens, or a patch is cut off as if it were CLS.
        """
        configured = getattr(self.model.config, "vision_feature_select_strategy", None)
        strategy = inputs.get("vision_feature_select_strategy") or configured
        fitting = "default" if self.has_cls else "full"
        if strategy not in (None, fitting):
            raise ValueError(
                f"vision_feature_select_strategy={strategy!r} leaves no grid of patches in a tower "
                f"{'with' if self.has_cls else 'without'} a CLS token; set it to {fitting!r}"
            )


def pool(kind: str, value: Tensor, token_grid: tuple[int, int], pooling: int, order: str) -> Tensor:
    """Pool a signal from patches to tokens: attention is summed, vectors are averaged.

    Args:
        kind: the kind of the signal.
        value: the signal, `[tiles, heads, patches]`, or with a width behind the patches.
        token_grid: height x width of the tokens of a tile.
        pooling: patches along a side of a token.
        order: how patches are ordered, in einops' words.

    Returns:
        The signal with tokens in the place of patches; logits are joined so that their softmax is summed.
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


def as_pictures(pixels: Tensor) -> Tensor:
    """Turn normalised pixels into pictures, stretched to the full range: only the processor knows its mean.

    Args:
        pixels: the tiles of an image as the processor made them, `[tiles, 3, height, width]`.

    Returns:
        uint8 `[tiles, height, width, 3]` on the CPU.
    """
    pixels = pixels.detach().float()
    low, high = pixels.min(), pixels.max()
    scaled = (pixels - low) / (high - low).clamp(min=1e-6) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
