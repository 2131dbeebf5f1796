"""Steps the columns that matter most on the device at once, and the others on the host, in windows of several steps."""
