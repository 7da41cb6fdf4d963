"""Published sets, and the performance model held against them."""
