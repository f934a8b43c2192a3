"""Prints the checks of each family in the form of `models/verified.json`: ``python -m tests.helpers.verified``."""

from __future__ import annotations

import inspect
import json
from typing import Any

from tests.helpers.families import FAMILIES
from tests.models import test_families
from tokenprune.testing.families.mllama import FAMILY


def summary() -> dict[str, Any]:
    """Return the names of the checks, the tolerances and skipped checks of each adapter, and separate test files."""
    checks = [
        name
        for name, check in vars(test_families).items()
        if name.startswith("test_") and "family" in inspect.signature(check).parameters
    ]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in FAMILIES.values():
        tolerances = {"name": row.name, "full": row.full, "oracle": row.oracle, "beams": row.beams, "why": row.why}
        families.setdefault(row.adapter.__name__, []).append({**tolerances, "skip": dict(row.skip)})
    separate = {FAMILY.adapter.__name__: "tests/models/test_mllama.py"}
    return {"checks": checks, "families": {name: families[name] for name in sorted(families)}, "own": separate}


def text() -> str:
    """Return the summary as JSON."""
    return json.dumps(summary(), indent=1)


if __name__ == "__main__":
    print(text())
