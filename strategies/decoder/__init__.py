"""Strategies that drop visual tokens inside the LLM, one file per method.

Every strategy of the projector stage also acts at a cut: ``AtLayer(2, Random(0.5))`` and ``AtLayer(2,
UniformStride(0.5))`` are the baselines of this stage.
"""

from tokenprune.strategies.decoder.dart import DART
from tokenprune.strategies.decoder.fastv import FastV
from tokenprune.strategies.decoder.feather import FEATHER
from tokenprune.strategies.decoder.pyramiddrop import PyramidDrop
from tokenprune.strategies.decoder.sparsevlm import SparseVLM
from tokenprune.strategies.decoder.transprune import TransPrune
from tokenprune.strategies.decoder.v2drop import V2Drop
from tokenprune.strategies.decoder.visiondrop import VisionDrop
from tokenprune.strategies.decoder.vtw import VTW

__all__ = ["DART", "FEATHER", "VTW", "FastV", "PyramidDrop", "SparseVLM", "TransPrune", "V2Drop", "VisionDrop"]
