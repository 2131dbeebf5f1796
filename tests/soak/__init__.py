"""A run that everything happens to, for as long as you like: `python -m tests.soak`."""
