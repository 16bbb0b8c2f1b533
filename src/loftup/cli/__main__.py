"""``python -m loftup.cli``."""

import sys

from . import main

sys.exit(main())
