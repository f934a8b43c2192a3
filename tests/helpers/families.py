"""The families of the test matrix. Llama 3.2 Vision has tests of its own, because its prompt does not shrink."""

from __future__ import annotations

from tokenprune.testing import families

FAMILIES = {name: family for name, family in families.FAMILIES.items() if name != "mllama"}
