"""AxoNN: asynchronous hybrid-parallel training of large networks (data x inter-layer x tensor)."""
