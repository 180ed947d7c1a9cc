"""What an engineer attaches to a change request: an adapter, its facts before and after, and what moved beside them."""
