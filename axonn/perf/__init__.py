"""Performance model: machine, kernels, network, memory and simulator; `predict` combines them."""
