"""Training runs of `axonn train`: loop, run folder, records, supervision."""
