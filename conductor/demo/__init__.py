"""Hold the built-in demo: a small trained model, its suite and its calibration text.

The scripts beside this file made all of it; a release reads the files and runs none of them.
"""
