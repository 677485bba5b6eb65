"""How weights sit on a device: one strategy a file. Knows no family."""
