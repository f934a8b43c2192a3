"""Reads the versions, the device and the commit of a run."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from tokenprune.dependencies import read_version
from tokenprune.experiments.evaluation.identity import LIBRARIES


def describe_environment(model: Any) -> dict[str, Any]:
    """Return versions, device and commit, the content of ``environment.json``."""
    device = str(model.device)
    return {
        **{package: read_version(package) for package in LIBRARIES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(model.device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "commit": _read_commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _read_commit() -> str | None:
    """Return the commit of this code, with `-dirty` if files were changed since; None outside a checkout of it."""
    folder = Path(__file__).resolve().parent
    try:
        # An installed copy may lie in a checkout of another project, whose commit would be wrong here.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, check=True)
        command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
