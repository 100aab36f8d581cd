"""Jobs of a Slurm cluster: its commands, what its states mean, submitting and following."""
