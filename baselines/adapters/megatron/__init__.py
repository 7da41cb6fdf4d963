"""Megatron-LM: megatron-core on this machine, and its training script on clusters."""
