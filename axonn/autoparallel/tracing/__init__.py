"""Tracing of an ordinary module into a graph of normal form, with the source line of each node."""
