"""`python -m experiments`: the `axonn` command."""

from axonn.cli.main import main

if __name__ == "__main__":
    main()
