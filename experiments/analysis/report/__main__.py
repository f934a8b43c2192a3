"""Entry point of ``python -m tokenprune.experiments.analysis.report``."""

import jsonargparse

from tokenprune.experiments.analysis.report import main

jsonargparse.auto_cli(main, as_positional=False)
