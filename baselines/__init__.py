"""Other frameworks on the same work: one adapter each, and the comparison with our engine."""
