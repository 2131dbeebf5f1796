"""Tools of the command line for checkpoints: inspect, verify, compare and convert."""
