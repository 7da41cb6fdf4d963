"""`python -m axonn`: runs the `axonn` command, which lies above this package and is found by its entry point."""

import sys
from importlib.metadata import entry_points

if __name__ == "__main__":
    installed = list(entry_points(group="console_scripts", name="axonn"))
    if not installed:
        sys.exit("error: the command axonn is not installed; type make install in the project's folder")
    installed[0].load()()
