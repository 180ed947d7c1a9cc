"""What an edit does inside a model: by token, by block and by dimension, as data, page and picture."""
