"""The engine that steps in host memory during backward and the next forward, exactly."""
