"""The engine room: assembles units, transports, engines and link from the configs. Knows torch only."""
