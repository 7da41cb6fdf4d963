"""`python -m axonn`: the command of this name, which stands above this package and is registered with it."""

import sys
from importlib.metadata import entry_points

if __name__ == "__main__":
    found = list(entry_points(group="console_scripts", name="axonn"))
    if not found:
        sys.exit("error: the command axonn is not installed; type make install in the project's folder")
    found[0].load()()
