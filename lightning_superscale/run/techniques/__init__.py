"""What a run does to a module around its forwards: one file per technique, one line each in `registry.py`."""
