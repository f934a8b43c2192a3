"""Runs the command ``tokenprune`` as ``python -m tokenprune``."""

import sys

from tokenprune.cli.main import main

sys.exit(main())
