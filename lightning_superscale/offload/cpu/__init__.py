"""The synchronous engine: states in host memory, stepped after backward."""
