"""Seconds and bytes of a training step: compute, collectives, update, memory."""
