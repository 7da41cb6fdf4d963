"""Observations of a run: spans by phase, trace events, traffic, how busy the machine was, records and their provenance."""
