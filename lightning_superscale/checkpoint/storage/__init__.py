"""Where a checkpoint's files lie, and how they appear there all at once."""
