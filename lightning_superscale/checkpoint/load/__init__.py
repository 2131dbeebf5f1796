"""Reading a universal checkpoint into any layout."""
