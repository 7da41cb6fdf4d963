"""One stage of the pipeline: its layers, its compute and activations, and the messages it sends and receives."""
