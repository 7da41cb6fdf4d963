"""Automatic tensor parallelism: layouts that follow the data flow of an ordinary module (`axonn.parallelize`).

`tracing` records the graph of the module with its shapes; `layouts` knows how each operation carries a cut and searches
for the cheapest layouts; `layer_kinds` and `sharded_layers` say which layers can be cut and how; `rewrite` builds the
module of one rank; `parallelize` puts these together.
"""
