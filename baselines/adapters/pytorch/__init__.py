"""PyTorch's own data, pipeline and tensor parallelism."""
