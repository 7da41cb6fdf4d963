"""Layouts of the values of a graph: the sharding rules of operations, and the search for the cheapest layouts."""
