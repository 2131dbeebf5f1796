"""Weights that live in host memory and stream through the device block by block."""
