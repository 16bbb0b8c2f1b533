"""``python -m loftup``."""

import sys

from .cli import main

sys.exit(main())
