"""Transport of ZeRO-0, 1 and 2: flat buckets that parameters view, reduced and gathered as a whole."""
