"""Render the reference of the Python interface: python -m tools.reference FOLDER."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import axonn


def main(folder: Path) -> None:
    """HTML of `axonn` and all that is in it, with the sources. Raises `SystemExit` without a folder."""
    # It is imported when it is first asked for, which is too late to be seen.
    vars(axonn).update({name: getattr(axonn, name) for name in axonn.__all__})
    # Packages bring their modules, and dataclasses constructors whose annotations nobody can see.
    warnings.simplefilter("ignore", UserWarning)
    modules = [found.name for found in pkgutil.walk_packages(axonn.__path__, "axonn.")]
    pdoc.render.configure(docformat="google", math=False, search=True)
    pdoc.pdoc("axonn", *modules, output_directory=folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.reference FOLDER")
    main(Path(sys.argv[1]))
