"""Writing a universal checkpoint: who writes what, now or in the background."""
