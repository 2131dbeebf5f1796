"""The `superscale` command line."""
