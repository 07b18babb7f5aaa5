"""`python -m gpt_ext`: the same as the command `gpt-ext`, and what torchrun starts."""

import os
import sys

from gpt_ext.cli import main

code = main()
if "TORCHELASTIC_RUN_ID" in os.environ:
    # A thread of gloo gives up the tensors of a collective a moment after it is done, and needs the
    # interpreter for that. FSDP's caches keep those threads to the end, where who asks for an
    # interpreter that is being taken down aborts the process: so it is not taken down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
