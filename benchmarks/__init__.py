"""Measurements against peers: `python -m benchmarks.NAME`. README.md says what each measures."""
