"""``python -m tokenprune`` is the command ``tokenprune``."""

import sys

from tokenprune.cli.main import main

sys.exit(main())
