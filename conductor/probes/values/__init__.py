"""What tensors hold: scales, weights beside the source's, bytes of what is left alone.

The only part of the probes that reads tensor bytes. Its modules import numpy, so nothing imports
them at the top of a module: headers are read in less time than numpy takes to load.
"""
