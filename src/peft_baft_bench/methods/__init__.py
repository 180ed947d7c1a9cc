"""Editing methods, one file per method."""
