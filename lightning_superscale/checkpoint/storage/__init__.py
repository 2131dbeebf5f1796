"""The places of a checkpoint's files, local and remote, where they appear all at once."""
