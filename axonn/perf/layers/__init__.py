"""Layers of the performance model: their kernels, parameters, collectives and saved activations."""
