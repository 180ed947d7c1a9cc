"""Questions put to models: those of the data, and further kinds that are generated from it."""
