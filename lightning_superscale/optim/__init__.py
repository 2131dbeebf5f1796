"""The optimizer: units of parameters, their states, the rules that step them, and the engine that drives both."""
