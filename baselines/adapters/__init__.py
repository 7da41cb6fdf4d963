"""Adapters of the other frameworks, one folder for each."""
