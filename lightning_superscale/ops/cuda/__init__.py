"""Typed entry points over the CUDA kernels, and the CUDA driver calls that need no torch."""
