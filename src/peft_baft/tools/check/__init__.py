"""Check on a user's own model that edits are trained, saved and applied at the right tokens."""
