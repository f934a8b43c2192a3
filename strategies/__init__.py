"""Published strategies, one file per method; `components` holds the parts they are made of."""

if __name__ != "tokenprune.strategies":
    raise ImportError("import tokenprune.strategies, not strategies: the folder is part of the tokenprune package")

from tokenprune.strategies.divprune import DivPrune
from tokenprune.strategies.fastervlm import FasterVLM
from tokenprune.strategies.globalcom2 import GlobalCom2
from tokenprune.strategies.hiprune import HiPrune
from tokenprune.strategies.hired import HiRED
from tokenprune.strategies.holov import HoloV
from tokenprune.strategies.scope import SCOPE
from tokenprune.strategies.vispruner import VisPruner

__all__ = ["SCOPE", "DivPrune", "FasterVLM", "GlobalCom2", "HiPrune", "HiRED", "HoloV", "VisPruner"]
