"""Universal checkpoints: written on any layout, read on any other."""
