"""Optimizers whose state may lie in host memory, and the reduction of gradients that goes with them."""
