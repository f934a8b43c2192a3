"""Settings for all tests."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and so do the processes that tests start
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples every time, so that a change is never blamed for what an earlier one broke. To search further:
# pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
