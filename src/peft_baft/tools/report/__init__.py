"""Report on an adapter for a review: the answers to its facts before and after, and other answers that changed."""
