"""Lets ``python -m tokenprune.experiments.report`` write a report."""

import jsonargparse

from tokenprune.experiments.report import main

jsonargparse.auto_cli(main, as_positional=False)
