"""The simulator: virtual time, seeded, deterministic. Pure: no I/O, no clock, no engine."""
