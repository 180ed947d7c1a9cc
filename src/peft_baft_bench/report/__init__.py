"""Tables and figures from result lines."""
