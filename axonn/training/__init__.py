"""Training runs, as `axonn train` does them: loop, run folder, records."""
