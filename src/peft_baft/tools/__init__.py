"""Tools for a finished adapter: check that it works on a model, inspect an edit, and report on all edits."""
