"""``python -m tokenprune`` is the command ``tokenprune``."""

import sys

from tokenprune.cli import main

sys.exit(main())
