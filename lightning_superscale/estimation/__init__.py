"""Predicts what a training run takes of memory and time, before any of it is there: one model on fake tensors."""
