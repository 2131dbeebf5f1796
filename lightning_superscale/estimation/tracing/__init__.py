"""What one training step of a model does, found on tensors without memory."""
