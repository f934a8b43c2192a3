"""Second looks: attention of another model, for vision towers without a CLS token."""

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
from tokenprune.saliency import SaliencyModel, SaliencyOutput, resampled


@dataclass
class TimmSaliency(SaliencyModel):
    """CLS attention of a timm ViT that looks at the same tiles: HiRED on models whose tower has no CLS token.

    Tiles are resized to what the ViT takes, and its attention is laid over the tokens of a tile. Layer choices count
    in this ViT: its last layer is the feature layer. It runs in float32, once for each image; the account says its
    FLOPs.

    Args:
        model_name: a timm model with a CLS token and `blocks` of plain attention, such as
            ``"vit_base_patch16_dinov3.lvd1689m"``.
        pretrained: whether to load timm's weights from the hub or its cache. Without them and without a checkpoint the
            weights are random, the same ones each time.
        checkpoint: a file of weights to load instead.
        image_size: side in pixels of what the ViT is shown; left out, what it was made for.
    """

    model_name: str = "vit_small_patch16_224"
    pretrained: bool = True
    checkpoint: str | None = None
    image_size: int | None = None

    @property
    def name(self) -> str:
        """Class and model."""
        return f"{type(self).__name__}({self.model_name})"

    def look(self, images: Tensor, token_grid: tuple[int, int], layers: Sequence[LayerChoice]) -> SaliencyOutput:
        """Return the CLS attention of the ViT, laid over the tokens.

        Raises:
            ValueError: if timm has no such model with a CLS token, its weights cannot be had, or a layer is none of it.
        """
        vit = _load(self.model_name, self.pretrained, self.checkpoint, self.image_size)
        depth = len(vit.model.blocks)
        wanted = {index for choice in layers for index in resolve_layers(choice, depth, depth - 1)}
        shown = F.interpolate(images.float(), vit.size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (shown.new_tensor(one).view(-1, 1, 1) for one in (vit.mean, vit.std))
        rows = cls_attention(vit.model.to(shown.device), (shown - mean) / std, wanted)
        over_tokens = {index: resampled(row, vit.grid, token_grid) for index, row in rows.items()}
        return SaliencyOutput(over_tokens, depth, depth - 1, vit.flops * len(images))


class _Reader(TorchFunctionMode):
    """Reads one attention row at the next call of torch's attention function, whatever kernel it takes.

    Args:
        prefix: tokens before the patches.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.next: int | None = None
        self.rows: dict[int, Tensor] = {}

    def expect(self, index: int, *_: Any) -> None:
        """Note the layer whose attention comes next."""
        self.next = index

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self.next is not None:
            named = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **given}
            row = cls_row(named["query"], named["key"], named.get("attn_mask"), named.get("scale"))
            self.rows[self.next], self.next = row[:, :, self.prefix :], None
        return func(*args, **given)


def cls_row(query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Return how CLS, the first token, attends to all tokens, float32 `[tiles, heads, length]`.

    Args:
        query: queries, `[tiles, heads, length, head_dim]`.
        key: keys, likewise.
        mask: what torch's attention function is given: bool, or added to the logits, `[..., length, length]`.
        scale: factor on the dot products; one over the root of the width of a head if left out.
    """
    logits = query[:, :, :1] @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        first = mask[..., :1, :]
        logits = logits.masked_fill(~first, -torch.inf) if first.dtype == torch.bool else logits + first
    return logits.softmax(dim=-1, dtype=torch.float32)[:, :, 0]


@torch.no_grad()
def cls_attention(model: Any, pixels: Tensor, layers: set[int]) -> dict[int, Tensor]:
    """Return how the CLS token of a timm ViT attends to the patches, without any full map.

    Args:
        model: the ViT, with fused attention.
        pixels: normalized pixels, `[tiles, 3, height, width]`.
        layers: indices of the layers to read.

    Returns:
        Rows by layer, softmaxed over all tokens, `[tiles, heads, patches]` each; they sum to less than 1.
    """
    reader = _Reader(model.num_prefix_tokens)
    with ExitStack() as undo:
        for index in layers:
            hook = model.blocks[index].attn.register_forward_pre_hook(partial(reader.expect, index))
            undo.callback(hook.remove)
        undo.enter_context(reader)
        model.forward_features(pixels)
    return reader.rows


class _Vit(NamedTuple):
    """A timm ViT and what must be known to show it images.

    Args:
        model: the model.
        size: height x width of its images in pixels.
        grid: height x width of its patches.
        mean: mean of the colors.
        std: their standard deviation.
        flops: of one image.
    """

    model: Any
    size: tuple[int, int]
    grid: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flops: int


@cache
def _load(name: str, pretrained: bool, checkpoint: str | None, image_size: int | None) -> _Vit:
    """Load a timm ViT once.

    Raises:
        ValueError: if there is no such model, its weights cannot be had, or it has no CLS attention to read.
    """
    import timm

    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"timm has no model {name!r}.{hint} timm.list_models('vit*', pretrained=True) lists them")
    with torch.device("meta"):
        outline = _checked(name, timm.create_model(name, pretrained=False, **size))
    height, width = outline.patch_embed.img_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outline.forward_features(torch.zeros(1, 3, height, width, device="meta"))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(
                name, pretrained=pretrained and checkpoint is None, checkpoint_path=checkpoint or "", **size
            )
    except Exception as error:  # the hub, its cache, and a file of weights each fail in ways of their own
        first = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the weights of {name} cannot be had from {checkpoint or 'the hub'} ({type(error).__name__}: {first}). "
            "Load them once with a network, or give a file of weights as checkpoint; pretrained=False takes random "
            "ones, which see nothing"
        ) from error
    config: Any = model.pretrained_cfg
    return _Vit(
        _checked(name, model),
        (height, width),
        outline.patch_embed.grid_size,
        tuple(config["mean"]),
        tuple(config["std"]),
        counter.get_total_flops(),
    )


def _checked(name: str, model: Any) -> Any:
    """Return a timm model made ready: evaluating, with torch's attention function.

    Raises:
        ValueError: if it has no CLS token among its tokens, or its attention is of another kind.
    """
    blocks = getattr(model, "blocks", ())
    fused = [getattr(getattr(block, "attn", None), "fused_attn", None) for block in blocks]
    prefix, cls = getattr(model, "num_prefix_tokens", 0), getattr(model, "cls_token", None)
    if not prefix or cls is None or not fused or None in fused or not hasattr(model, "patch_embed"):
        raise ValueError(
            f"{name} is no plain ViT with a CLS token, whose attention could be read; timm has many, such as "
            "vit_small_patch16_224, vit_base_patch16_dinov3 or vit_base_patch16_clip_224"
        )
    for block in blocks:
        block.attn.fused_attn = True
    return model.eval().requires_grad_(False)
