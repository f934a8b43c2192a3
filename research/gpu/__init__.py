"""Checks and measurements on a GPU; `run.sh` runs all of them."""
