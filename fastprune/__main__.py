"""`python -m fastprune` is the command `fastprune`."""

import sys

from .cli import main

sys.exit(main())
