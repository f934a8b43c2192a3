"""tokenprune: pluggable visual token reduction for vision-language models.

Each public name is imported at its first use, so that `import tokenprune` loads no other module.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.account import TokenAccount as TokenAccount
    from tokenprune.adapter import Adapter as Adapter
    from tokenprune.attach import Attachment as Attachment
    from tokenprune.budget import Budget as Budget
    from tokenprune.budget import apportion as apportion
    from tokenprune.comparison import Comparison as Comparison
    from tokenprune.comparison import compare as compare
    from tokenprune.compiled import CompileOptions as CompileOptions
    from tokenprune.component_reducer import ComponentReducer as ComponentReducer
    from tokenprune.decoder_reducer import AtLayer as AtLayer
    from tokenprune.decoder_reducer import DecoderReducer as DecoderReducer
    from tokenprune.encoder.patches import PatchGroups as PatchGroups
    from tokenprune.encoder_reducer import EncoderReducer as EncoderReducer
    from tokenprune.encoder_reducer import PatchDropReducer as PatchDropReducer
    from tokenprune.encoder_reducer import PatchMergeReducer as PatchMergeReducer
    from tokenprune.geometry import TileGeometry as TileGeometry
    from tokenprune.image import EncodedImage as EncodedImage
    from tokenprune.image import Signal as Signal
    from tokenprune.image_reducer import ImageReducer as ImageReducer
    from tokenprune.layers import LayerChoice as LayerChoice
    from tokenprune.pipeline import Pipeline as Pipeline
    from tokenprune.pixel_reducer import PixelReducer as PixelReducer
    from tokenprune.policies import AllocationPolicy as AllocationPolicy
    from tokenprune.policies import Merged as Merged
    from tokenprune.policies import MergingPolicy as MergingPolicy
    from tokenprune.policies import OrderPolicy as OrderPolicy
    from tokenprune.policies import RelevancePolicy as RelevancePolicy
    from tokenprune.policies import SelectionPolicy as SelectionPolicy
    from tokenprune.prepared_call import PreparedCall as PreparedCall
    from tokenprune.reducer import Composed as Composed
    from tokenprune.reducer import ScoreReducer as ScoreReducer
    from tokenprune.reducer import TokenReducer as TokenReducer
    from tokenprune.rewrite import Rows as Rows
    from tokenprune.rewrite import align as align
    from tokenprune.run import Run as Run
    from tokenprune.saliency import SaliencyModel as SaliencyModel
    from tokenprune.saliency import SaliencyOutput as SaliencyOutput
    from tokenprune.selection import Selection as Selection
    from tokenprune.vision_encoder import ImageEmbeddings as ImageEmbeddings
    from tokenprune.vision_encoder import VisionEncoder as VisionEncoder

__version__ = "0.1.0"

_MODULES = {
    "Adapter": "adapter",
    "AllocationPolicy": "policies",
    "AtLayer": "decoder_reducer",
    "Attachment": "attach",
    "Budget": "budget",
    "CompileOptions": "compiled",
    "Comparison": "comparison",
    "ComponentReducer": "component_reducer",
    "Composed": "reducer",
    "DecoderReducer": "decoder_reducer",
    "EncodedImage": "image",
    "ImageEmbeddings": "vision_encoder",
    "EncoderReducer": "encoder_reducer",
    "ImageReducer": "image_reducer",
    "LayerChoice": "layers",
    "Merged": "policies",
    "MergingPolicy": "policies",
    "OrderPolicy": "policies",
    "PatchDropReducer": "encoder_reducer",
    "PatchGroups": "encoder.patches",
    "PatchMergeReducer": "encoder_reducer",
    "Pipeline": "pipeline",
    "PixelReducer": "pixel_reducer",
    "PreparedCall": "prepared_call",
    "RelevancePolicy": "policies",
    "Rows": "rewrite",
    "Run": "run",
    "ScoreReducer": "reducer",
    "SaliencyModel": "saliency",
    "SaliencyOutput": "saliency",
    "Selection": "selection",
    "SelectionPolicy": "policies",
    "Signal": "image",
    "TileGeometry": "geometry",
    "TokenAccount": "account",
    "TokenReducer": "reducer",
    "VisionEncoder": "vision_encoder",
    "align": "rewrite",
    "apportion": "budget",
    "compare": "comparison",
}

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    """Return a public name after the import of its module.

    Raises:
        ImportError: if ``from tokenprune import NAME`` names a strategy or a component; the message names its package.
        AttributeError: if there is no such name.
    """
    if name not in _MODULES:
        package = _find_package(name)
        hint = f"; write `from {package} import {name}`" if package else ""
        message = f"module 'tokenprune' has no attribute {name!r}{hint}"
        # In a `from` import, Python replaces the message of an AttributeError, but not of an ImportError.
        is_from_import = sys._getframe(1).f_code.co_filename.startswith("<frozen importlib")
        raise ImportError(message) if hint and is_from_import else AttributeError(message)
    return getattr(importlib.import_module(f"tokenprune.{_MODULES[name]}"), name)


def _find_package(name: str) -> str | None:
    """Return the package that exports a strategy or a component; None if there is none. Nothing is imported."""
    for package in ("tokenprune.strategies", "tokenprune.strategies.components"):
        file = Path(__file__).parent.joinpath(*package.split(".")[1:], "__init__.py")
        if file.is_file() and f'\n    "{name}",\n' in file.read_text(encoding="utf-8"):
            return package
    return None


def __dir__() -> list[str]:
    """Return all public names, including names that are not yet imported."""
    return sorted(__all__)
