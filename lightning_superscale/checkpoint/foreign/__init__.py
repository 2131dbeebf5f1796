"""Checkpoints that others wrote, or read."""
