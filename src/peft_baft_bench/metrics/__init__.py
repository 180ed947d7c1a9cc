"""Measures of what an edited model says, by name."""
