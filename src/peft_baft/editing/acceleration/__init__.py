"""Faster implementations of computations of an edit. Without this folder, edits take longer and have the same results."""
