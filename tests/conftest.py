"""Settings for all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples every time, so that a change is never blamed for what an earlier one broke. To search further:
# pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
