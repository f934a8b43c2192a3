"""Saliency models: CLS attention of a second model, for vision towers without a CLS token."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.layers import LayerChoice, resolve_layers
from tokenprune.saliency import SaliencyModel, SaliencyOutput, resample_attention


@dataclass
class TimmSaliency(SaliencyModel):
    """Computes the CLS attention of a timm ViT over the same tiles.

    It lets strategies such as HiRED run on models whose vision tower has no CLS token. Tiles are resized to the input
    size of the ViT, and its attention is resampled to the token grid of a tile. Layer choices refer to the layers of
    this ViT, and its last layer is the feature layer. The ViT runs in float32, once per image. The account of the run
    includes its FLOPs.

    Args:
        model_name: name of a timm model with a CLS token and plain attention in its `blocks`, such as
            ``"vit_base_patch16_dinov3.lvd1689m"``.
        pretrained: whether to load timm's weights from the hub or its cache. If it is false and there is no checkpoint,
            the weights are random with a fixed seed.
        checkpoint: path of a weights file to load instead.
        image_size: side of the input image of the ViT in pixels; by default the side in timm's configuration.
    """

    model_name: str = "vit_small_patch16_224"
    pretrained: bool = True
    checkpoint: str | None = None
    image_size: int | None = None

    @property
    def name(self) -> str:
        """The class name and the timm model name."""
        return f"{type(self).__name__}({self.model_name})"

    def compute_attention(
        self, images: Tensor, token_grid: tuple[int, int], layers: Sequence[LayerChoice]
    ) -> SaliencyOutput:
        """Return the CLS attention of the ViT, resampled to the token grid.

        Raises:
            ValueError: if timm has no such model with a CLS token, if its weights cannot be loaded, or if the ViT lacks
                a layer.
        """
        vit = _load_vit(self.model_name, self.pretrained, self.checkpoint, self.image_size)
        depth = len(vit.model.blocks)
        layer_indices = {index for choice in layers for index in resolve_layers(choice, depth, depth - 1)}
        pixels = F.interpolate(images.float(), vit.size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (pixels.new_tensor(channels).view(-1, 1, 1) for channels in (vit.mean, vit.std))
        rows = cls_attention(vit.model.to(pixels.device), (pixels - mean) / std, layer_indices)
        token_rows = {index: resample_attention(row, vit.grid, token_grid) for index, row in rows.items()}
        return SaliencyOutput(token_rows, depth, depth - 1, vit.flops * len(images))


class _AttentionRecorder(TorchFunctionMode):
    """Records the CLS row of the next call of torch's attention function. Works with every attention kernel.

    Args:
        n_prefix: number of tokens before the patches.
    """

    def __init__(self, n_prefix: int) -> None:
        super().__init__()
        self.n_prefix = n_prefix
        self.next_layer: int | None = None
        self.rows: dict[int, Tensor] = {}

    def start_layer(self, index: int, *_: Any) -> None:
        """Store the index of the layer that calls the attention function next."""
        self.next_layer = index

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self.next_layer is not None:
            inputs = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **options}
            row = cls_row(inputs["query"], inputs["key"], inputs.get("attn_mask"), inputs.get("scale"))
            self.rows[self.next_layer], self.next_layer = row[:, :, self.n_prefix :], None
        return func(*args, **options)


def cls_row(query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Return the attention of the CLS token, which comes first, to all tokens, float32 `[tiles, heads, length]`.

    Args:
        query: queries, `[tiles, heads, length, head_dim]`.
        key: keys, `[tiles, heads, length, head_dim]`.
        mask: mask of torch's attention function, `[..., length, length]`: bool, or a float that is added to the logits.
        scale: factor of the dot products; ``head_dim ** -0.5`` by default.
    """
    logits = query[:, :, :1] @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        cls_mask = mask[..., :1, :]
        logits = logits.masked_fill(~cls_mask, -torch.inf) if cls_mask.dtype == torch.bool else logits + cls_mask
    return logits.softmax(dim=-1, dtype=torch.float32)[:, :, 0]


@torch.no_grad()
def cls_attention(model: Any, pixels: Tensor, layers: set[int]) -> dict[int, Tensor]:
    """Return the CLS attention of a timm ViT to its patches, without materializing attention maps.

    Args:
        model: timm ViT with fused attention.
        pixels: normalized pixels, `[tiles, 3, height, width]`.
        layers: indices of the layers to read.

    Returns:
        CLS attention by layer, `[tiles, heads, patches]` each. The softmax includes the prefix tokens, so the sum over
        the patches is less than 1.
    """
    recorder = _AttentionRecorder(model.num_prefix_tokens)
    with ExitStack() as stack:
        for index in layers:
            hook = model.blocks[index].attn.register_forward_pre_hook(partial(recorder.start_layer, index))
            stack.callback(hook.remove)
        stack.enter_context(recorder)
        model.forward_features(pixels)
    return recorder.rows


class _Vit(NamedTuple):
    """A timm ViT with its input size, normalization and FLOPs.

    Args:
        model: the model.
        size: height x width of its input images in pixels.
        grid: height x width of its patch grid.
        mean: mean of the colors.
        std: standard deviation of the colors.
        flops: FLOPs of a forward pass of one image.
    """

    model: Any
    size: tuple[int, int]
    grid: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flops: int


@cache
def _load_vit(name: str, pretrained: bool, checkpoint: str | None, image_size: int | None) -> _Vit:
    """Load a timm ViT, and cache it for further calls.

    Raises:
        ValueError: if timm has no such model, if its weights cannot be loaded, or if it has no readable CLS attention.
    """
    import timm

    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if not timm.is_model(name.partition(".")[0]):
        matches = difflib.get_close_matches(name, timm.list_models(), n=2)
        hint = f" Did you mean {' or '.join(matches)}?" if matches else ""
        raise ValueError(f"timm has no model {name!r}.{hint} timm.list_models('vit*', pretrained=True) lists them")
    with torch.device("meta"):
        meta_model = _prepare_vit(name, timm.create_model(name, pretrained=False, **size))
    height, width = meta_model.patch_embed.img_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_model.forward_features(torch.zeros(1, 3, height, width, device="meta"))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(
                name, pretrained=pretrained and checkpoint is None, checkpoint_path=checkpoint or "", **size
            )
    except Exception as error:  # the hub, its cache and a weights file raise different errors
        cause = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the weights of {name} cannot be loaded from {checkpoint or 'the hub'} ({type(error).__name__}: {cause}). "
            "Load them once with network access, or pass a weights file as checkpoint; pretrained=False uses random "
            "weights, whose attention has no meaning"
        ) from error
    config: Any = model.pretrained_cfg
    return _Vit(
        _prepare_vit(name, model),
        (height, width),
        meta_model.patch_embed.grid_size,
        tuple(config["mean"]),
        tuple(config["std"]),
        counter.get_total_flops(),
    )


def _prepare_vit(name: str, model: Any) -> Any:
    """Set a timm model to evaluation mode with fused attention, and return it.

    Raises:
        ValueError: if the model has no CLS token, or if its blocks do not support fused attention.
    """
    blocks = getattr(model, "blocks", ())
    fused = [getattr(getattr(block, "attn", None), "fused_attn", None) for block in blocks]
    prefix, cls = getattr(model, "num_prefix_tokens", 0), getattr(model, "cls_token", None)
    if not prefix or cls is None or not fused or None in fused or not hasattr(model, "patch_embed"):
        raise ValueError(
            f"{name} is no plain ViT with a CLS token, so its CLS attention cannot be read; use a model such as "
            "vit_small_patch16_224, vit_base_patch16_dinov3 or vit_base_patch16_clip_224"
        )
    for block in blocks:
        block.attn.fused_attn = True
    return model.eval().requires_grad_(False)
