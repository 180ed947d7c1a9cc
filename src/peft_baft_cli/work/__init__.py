"""The work of each command: a function that takes its options and returns its exit code."""
