"""Fuzzing of the request surface: `make fuzz`."""
