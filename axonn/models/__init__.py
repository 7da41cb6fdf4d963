"""Architectures, one folder each, and what the engine and the performance model ask of every one."""
