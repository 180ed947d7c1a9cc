"""The work of each command, in a function that takes its options and returns its exit code."""
