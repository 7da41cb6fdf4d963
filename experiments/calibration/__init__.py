"""Calibration (`axonn calibrate`): microbenchmarks of this machine, which give its machine file."""
