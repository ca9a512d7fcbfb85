"""Benchmarks of jaxlora against its rivals: `python -m benchmarks --list`."""
