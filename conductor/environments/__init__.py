"""The locked environments that workers run in, and their builder."""
