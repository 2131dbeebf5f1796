"""Long sequences: what a rank holds of a sample's activations, and how ranks share a sample."""
