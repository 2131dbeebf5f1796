"""The native libraries: found, built from a source checkout, loaded."""
