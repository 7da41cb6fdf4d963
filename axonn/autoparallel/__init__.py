"""Layouts that follow the data flow of an ordinary module: what `axonn.parallelize` is made of.

`trace` records the graph and its shapes, `operations` and `table` say which cuts each operation carries, `layers` which
layers can be cut and how, `assign` and `search` choose the layouts, `rows` finds out whether rows are independent, and
`rewrite` builds the module of one rank.
"""
