"""Distributed runtime: launch of ranks, collectives over the axes of the grid, and messages between stages."""
