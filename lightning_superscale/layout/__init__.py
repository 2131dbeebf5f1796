"""Pure arithmetic of shards: rows of parameters, boxes of tensors. Imports no torch."""
