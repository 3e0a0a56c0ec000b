"""``python -m fleetune``: the command line, whatever the current folder holds."""

import os
import sys

if sys.path and sys.path[0] in (
    "",
    os.getcwd(),
):  # put there by -m: the user's folder, not a place of libraries
    del sys.path[0]

from fleetune.toolkit.cli import main

if __name__ == "__main__":
    main()
