"""Optimizer states in host memory: the link to them, the buffers they live in, and the engines that step them."""
