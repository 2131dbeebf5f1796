"""Transports of ZeRO-0 to 3: they carry gradients to the optimizer's units, and new weights back."""
