"""The engine room: it assembles a run's units, transports, engines and link from the configs. It knows torch only."""
