"""Checkpoints that any grid can resume from: sharded tensors in safetensors files with an index in JSON."""
