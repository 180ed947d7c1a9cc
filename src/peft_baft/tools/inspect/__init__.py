"""Inspect what an edit does to each token in each block, as data, as an HTML page or as a picture."""
