"""Slurm clusters: as they are described, as they are, and what a job on one does."""
