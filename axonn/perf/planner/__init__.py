"""Search for the best configuration of the engine."""
