"""Probes: from files on disk to evidence. They measure, and judge nothing."""
