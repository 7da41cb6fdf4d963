"""Performance model: machine, kernels, network, memory, simulator; `predict` puts them together."""
