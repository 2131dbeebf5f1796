"""What the command line does with checkpoints: inspect, verify, compare, convert."""
