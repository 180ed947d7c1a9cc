"""Benchmarks by name, and readers of their file formats."""
