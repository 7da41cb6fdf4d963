"""Layers whose weights are cut along row and col."""
