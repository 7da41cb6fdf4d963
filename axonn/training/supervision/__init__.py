"""Supervision of the ranks of a run, from outside of them: start, liveness, signals, end."""
