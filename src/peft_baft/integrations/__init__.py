"""Other software, and what it needs to use an adapter rightly."""
