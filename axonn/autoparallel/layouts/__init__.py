"""Layouts of the values of a graph: how each operation carries a cut, and the search for the cheapest assignment."""
