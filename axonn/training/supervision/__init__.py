"""Supervision of the ranks of a run from outside: start, liveness, signals, end."""
