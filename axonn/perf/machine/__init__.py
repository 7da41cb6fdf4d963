"""Machine files: kernels and links of a machine, each number with its unit, source and status."""
