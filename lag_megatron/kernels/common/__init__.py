"""Compiling and loading kernels, and the arguments that implementations share."""
