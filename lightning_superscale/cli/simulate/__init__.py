"""`superscale simulate`: how a step's time grows with nodes and ranks."""
