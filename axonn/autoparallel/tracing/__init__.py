"""The graph of an ordinary module, in one normal form, with the source line of each node."""
