"""The plugins for Lightning: strategy, precision, checkpoint IO and callbacks, for both of its import names."""
