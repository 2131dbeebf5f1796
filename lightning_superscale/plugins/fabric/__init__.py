"""What knows Lightning Fabric: a strategy and a precision plugin over `Run`, under both of Fabric's import names."""
