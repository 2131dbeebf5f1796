"""The kernels themselves. These modules import Triton; the entry points import them when called."""
