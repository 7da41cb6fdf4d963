"""A real Slurm cluster on one machine, and jobs on it from end to end (make test-slurm)."""
