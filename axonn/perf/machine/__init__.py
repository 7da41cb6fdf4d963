"""Machine files: kernels and links of a machine, every number with its unit, source and status."""
