"""A run's training state, collected for a checkpoint and restored from one."""
