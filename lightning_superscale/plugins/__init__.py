"""Where the parts meet Lightning: strategy, precision and callbacks, for both of its import names."""
