"""A unit's weights between their uses: the stores that keep them, and the watch that lets every read wait for them."""
