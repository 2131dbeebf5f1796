"""Techniques that act on a run's module around its forwards: one file per technique, one line each in `registry.py`."""
