"""Executors: where workers and servers run."""
