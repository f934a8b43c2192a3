"""Lets ``python -m tokenprune.experiments.analysis.report`` write a report."""

import jsonargparse

from tokenprune.experiments.analysis.report import main

jsonargparse.auto_cli(main, as_positional=False)
