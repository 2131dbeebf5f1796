"""The plugins bound to each import name of Lightning."""
