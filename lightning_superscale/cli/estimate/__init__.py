"""`superscale estimate`: will it fit, how fast, and with which strategy."""
