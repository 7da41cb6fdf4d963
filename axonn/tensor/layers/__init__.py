"""Tensor-parallel layers, whose weights are cut along row and col."""
