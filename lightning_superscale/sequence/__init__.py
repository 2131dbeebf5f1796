"""Long sequences: each rank of a group has a part of every sample's tokens."""
