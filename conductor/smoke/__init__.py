"""Scenarios that run what users run, and say positively what must appear."""
