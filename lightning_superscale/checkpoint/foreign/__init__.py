"""Checkpoints of other programs: readers of their formats, and writers for exports to them."""
