"""Architectures, one folder each, and the interface that the engine and the performance model need of each."""
