"""PyTorch's own pipelining and tensor parallelism."""
