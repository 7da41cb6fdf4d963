"""Scripts that ranks of other frameworks run, in environments of their own where this suite is not installed."""
