"""Run methods on benchmarks with one protocol, and write one result line a run."""
