"""Render the reference of the Python interface: python -m tools.reference FOLDER."""

from __future__ import annotations

import argparse
import pkgutil
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import axonn


def main(folder: Path) -> None:
    """Write HTML of `axonn` and all that is in it, with the sources."""
    # These names are imported lazily, too late for pdoc to see them.
    vars(axonn).update({name: getattr(axonn, name) for name in axonn.__all__})
    # pdoc warns about packages' modules and dataclasses' constructors whose annotations it cannot resolve.
    warnings.simplefilter("ignore", UserWarning)
    names = (module.name for module in pkgutil.walk_packages(axonn.__path__, "axonn."))
    # Modules that run as commands have no interface.
    modules = [name for name in names if not name.endswith(".__main__")]
    pdoc.render.configure(docformat="google", math=False, search=True)
    pdoc.pdoc("axonn", *modules, output_directory=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.reference", description="The reference as HTML.")
    parser.add_argument("folder", type=Path, help="where to write it, for instance build/docs")
    main(parser.parse_args().folder)
