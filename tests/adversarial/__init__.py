"""Tries to break the package: what careless users, user code in odd places, faults and attackers do."""
