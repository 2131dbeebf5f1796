"""What this machine can do, measured, and the settings that follow from it."""
