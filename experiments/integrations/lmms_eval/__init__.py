"""The lmms-eval plug-in: ``lmms_eval --model tokenprune`` evaluates a strategy on any lmms-eval task.

lmms-eval loads this module while it builds its registry, and an error here would also disable all other plug-ins.
Therefore the module imports lmms-eval inside the function.
"""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """Return the `ModelManifest` of the plug-in, the payload of its entry point in the group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

    module = "tokenprune.experiments.integrations.lmms_eval.model"
    return ModelManifest("tokenprune", f"{module}.TokenPruneSimple", f"{module}.TokenPruneChat")
