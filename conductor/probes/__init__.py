"""Probes: from files on disk to evidence. They measure, and decide nothing."""
