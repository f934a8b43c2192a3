"""Tiny models and processors of all families, one file per family.

The models have random weights and the real transformers classes; the processors are the real ones, built without a
network. `FAMILIES` lists them by name:

>>> family = FAMILIES["llava_next"]
>>> model, inputs = family.model(), family.batch([(112, 112)], [(60, 160), (150, 50)])
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from tokenprune.testing.families.base import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name != "base")
    for family in import_module(f"{__name__}.{module}").FAMILIES
}
"""The families by name."""
