"""The `axonn` command: its entry, console and errors; upper floors register further commands."""
