"""Observations of a run: phases and traces from spans, traffic, load of the machine, and records."""
