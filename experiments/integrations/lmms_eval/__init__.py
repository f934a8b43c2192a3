"""The lmms-eval plug-in: ``lmms_eval --model tokenprune`` evaluates a strategy on any lmms-eval task.

This module is loaded by lmms-eval while its own registry is being built, and an error here would take all other
plug-ins down with it. So it imports nothing at its head.
"""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """Return the `ModelManifest` of the plug-in, the payload of its entry point in the group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

    here = "tokenprune.experiments.integrations.lmms_eval.model"
    return ModelManifest("tokenprune", f"{here}.TokenPruneSimple", f"{here}.TokenPruneChat")
