"""Measurements behind the pages of docs/measurements (README.md here names each): python -m benchmarks.NAME."""
