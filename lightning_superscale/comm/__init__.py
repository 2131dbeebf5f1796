"""Process groups, collectives and agreement between ranks."""
