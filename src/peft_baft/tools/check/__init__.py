"""Proof, on a user's own model, that edits are trained, kept and applied at the right tokens."""
