"""``python -m fleetune``: the command line, whatever the current folder holds."""

import os
import sys

# -m puts the current folder first: the user's, not a place of libraries.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from fleetune.toolkit.cli import main

if __name__ == "__main__":
    main()
