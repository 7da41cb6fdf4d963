"""Layers as the performance model knows them: kernels, parameters, collectives and what is kept for the backward."""
