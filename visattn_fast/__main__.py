"""Runs the command line as ``python -m visattn_fast``."""

import sys

from .cli import main

sys.exit(main())
