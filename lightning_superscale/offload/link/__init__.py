"""The way between host and device: copies, their dtype, and the host memory at its end."""
