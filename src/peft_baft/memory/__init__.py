"""A memory of edits: each one owns a code in a basis that all share, and a router picks one of them for a prompt, or none."""
