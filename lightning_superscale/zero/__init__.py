"""Shard units, the transports that feed them, and the optimizer engine that steps them."""
