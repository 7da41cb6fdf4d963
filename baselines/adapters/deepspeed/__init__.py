"""DeepSpeed: its strategies on this machine, and Megatron-DeepSpeed on clusters."""
