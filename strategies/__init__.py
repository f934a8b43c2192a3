"""Published strategies, one file per method.

`decoder` contains methods inside the LLM, `encoder` methods inside the vision tower, and `components` their parts.
"""

if __name__ != "tokenprune.strategies":
    raise ImportError("import tokenprune.strategies, not strategies: the folder is part of the tokenprune package")

from tokenprune.strategies.baselines import BaseTileOnly, Random, SpatialPooling, UniformStride
from tokenprune.strategies.cdpruner import CDPruner
from tokenprune.strategies.decoder import (
    DART,
    FEATHER,
    VTW,
    FastV,
    PyramidDrop,
    SparseVLM,
    TransPrune,
    V2Drop,
    VisionDrop,
)
from tokenprune.strategies.divprune import DivPrune
from tokenprune.strategies.eadp import EADP
from tokenprune.strategies.encoder import IPCV, EViT, PiToMe, RandomPatches, ToMe
from tokenprune.strategies.fastervlm import FasterVLM
from tokenprune.strategies.globalcom2 import GlobalCom2
from tokenprune.strategies.hero import HERO
from tokenprune.strategies.hiprune import HiPrune
from tokenprune.strategies.hired import HiRED
from tokenprune.strategies.holov import HoloV
from tokenprune.strategies.image_downsample import ImageDownsample
from tokenprune.strategies.pixelprune import PixelPrune
from tokenprune.strategies.prumerge import PruMerge, PruMergePlus
from tokenprune.strategies.question_first import QuestionFirst
from tokenprune.strategies.scope import SCOPE
from tokenprune.strategies.tops import TOPS
from tokenprune.strategies.trim import TRIM
from tokenprune.strategies.visionzip import VisionZip
from tokenprune.strategies.vispruner import VisPruner
from tokenprune.strategies.vtc_cls import VTCCLS

__all__ = [
    "DART",
    "EADP",
    "FEATHER",
    "HERO",
    "IPCV",
    "SCOPE",
    "TOPS",
    "TRIM",
    "VTCCLS",
    "VTW",
    "BaseTileOnly",
    "CDPruner",
    "DivPrune",
    "EViT",
    "FastV",
    "FasterVLM",
    "GlobalCom2",
    "HiPrune",
    "HiRED",
    "HoloV",
    "ImageDownsample",
    "PiToMe",
    "PixelPrune",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "QuestionFirst",
    "Random",
    "RandomPatches",
    "SparseVLM",
    "SpatialPooling",
    "ToMe",
    "TransPrune",
    "UniformStride",
    "V2Drop",
    "VisPruner",
    "VisionDrop",
    "VisionZip",
]
