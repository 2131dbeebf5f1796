"""Writing a universal checkpoint: dividing the work among ranks, and writing at once or in the background."""
