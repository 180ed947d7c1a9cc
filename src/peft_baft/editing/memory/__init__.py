"""Editing by a memory: each edit learns a code of its own, and is found again by its question."""
