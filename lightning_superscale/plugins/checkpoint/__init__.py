"""Universal checkpoints under any Lightning strategy."""
