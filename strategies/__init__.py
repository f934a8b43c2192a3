"""Published strategies, one file per method; `components` holds the parts they are made of."""

if __name__ != "tokenprune.strategies":
    raise ImportError("import tokenprune.strategies, not strategies: the folder is part of the tokenprune package")

from tokenprune.strategies.hired import HiRED

__all__ = ["HiRED"]
