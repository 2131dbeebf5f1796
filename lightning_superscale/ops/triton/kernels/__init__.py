"""The Triton kernels. These modules import Triton; the entry points import them when they are called."""
