"""Harnesses: the tools that ask questions and score answers."""
