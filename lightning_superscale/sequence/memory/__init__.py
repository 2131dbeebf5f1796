"""The long-context kit: activations that are tiled, recomputed, kept on the host or kept in fewer bits."""
