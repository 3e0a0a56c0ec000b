"""``python -m fleetune``: the command line, whatever the current folder holds."""

from fleetune.toolkit.cli import main

if __name__ == "__main__":
    main()
