"""Experiments: the points of figures, and the commands that measure, predict, plan, calibrate and compare."""
