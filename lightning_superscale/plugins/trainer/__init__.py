"""The Trainer's strategies, precision plugin and callbacks."""
