"""Typed entry points over the native libraries, their oracle, and the GPU kernels. Nothing is loaded on import."""
