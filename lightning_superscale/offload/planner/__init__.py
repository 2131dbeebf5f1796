"""Measures this machine's speeds, and chooses the settings that follow from them."""
