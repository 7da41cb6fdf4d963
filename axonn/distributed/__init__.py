"""Ranks that work together: launch, runtime, collectives over the axes of the grid, and messages between stages."""
