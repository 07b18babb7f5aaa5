"""`python -m gpt_ext`: the same as the command `gpt-ext`."""

import sys

from gpt_ext.cli import main

sys.exit(main())
