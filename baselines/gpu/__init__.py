"""Benchmarks of the engine on a GPU, part by part (`make bench-gpu`)."""
