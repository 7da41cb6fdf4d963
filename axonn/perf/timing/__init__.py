"""Seconds and bytes of the parts of a training step: compute, collectives, update, memory."""
