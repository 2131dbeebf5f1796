"""Which samples a run has seen, and where it goes on."""
