"""Algorithms of optimizers, one module each: its configuration, its update of flat buffers, and what that costs."""
