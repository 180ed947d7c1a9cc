"""Metrics of an edited model, by name."""
