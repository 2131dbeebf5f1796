"""The link between host and device: its copies, their dtype, and the host's buffers."""
