"""`python -m experiments`: the `axonn` command."""

from experiments.cli import main

if __name__ == "__main__":
    main()
