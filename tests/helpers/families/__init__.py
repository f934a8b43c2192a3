"""One file a family: a tiny model of the real class, and the real processor built offline. `FAMILIES` has them all."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from tests.helpers.families.base import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in sorted(one.name for one in pkgutil.iter_modules(__path__) if one.name != "base")
    for family in import_module(f"{__name__}.{module}").FAMILIES
}
