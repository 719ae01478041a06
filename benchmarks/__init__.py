"""Measurements that docs/log.md quotes. Run from the repository's root: `python -m benchmarks.NAME --help`."""
