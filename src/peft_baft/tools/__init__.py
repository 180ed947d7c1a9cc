"""Tools for a finished adapter: check it on a model, look inside it, report on it."""
