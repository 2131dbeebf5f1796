"""What a universal checkpoint's files hold, byte for byte."""
