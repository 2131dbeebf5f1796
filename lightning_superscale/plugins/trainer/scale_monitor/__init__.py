"""ScaleMonitor: what a training run does per second, where its bytes are, and what it waits for."""
