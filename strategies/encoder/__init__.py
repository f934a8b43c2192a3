"""Strategies that drop or merge patches inside the vision tower, one file per method."""

from tokenprune.strategies.encoder.evit import EViT
from tokenprune.strategies.encoder.ipcv import IPCV
from tokenprune.strategies.encoder.pitome import PiToMe
from tokenprune.strategies.encoder.random_patches import RandomPatches
from tokenprune.strategies.encoder.tome import ToMe

__all__ = ["IPCV", "EViT", "PiToMe", "RandomPatches", "ToMe"]
