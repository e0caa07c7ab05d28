"""What a run survives: checkpoints, a watchdog, bad steps, changed versions."""
