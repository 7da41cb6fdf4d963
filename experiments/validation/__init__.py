"""Validation: the performance model compared with published sets, and with measurements on this machine."""
