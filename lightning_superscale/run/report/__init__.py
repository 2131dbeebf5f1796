"""What a run says of itself: its plan, its bytes, its time."""
