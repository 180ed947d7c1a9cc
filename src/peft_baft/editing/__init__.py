"""Changing what a model knows through an adapter."""
