"""Measurements, each one command that prints a table: `python -m benchmarks NAME`. Results: RESULTS.md."""
