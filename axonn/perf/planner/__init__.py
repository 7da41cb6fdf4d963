"""The search for the best configuration of the engine."""
