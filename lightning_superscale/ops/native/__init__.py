"""Finds, builds (from a source checkout) and loads the native libraries."""
