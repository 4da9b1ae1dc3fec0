"""`python -m apportion ...`, the same as the `apportion` command."""

import os
import sys

# Python puts the working folder first, where a user's own file hides a library of its name; `main` puts it last.
if not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
    del sys.path[0]

from apportion.cli import main

sys.exit(main())
