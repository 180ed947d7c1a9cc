"""Compare editing methods: benchmarks, metrics, and one protocol for every method.

`peft_baft` never imports this package.
"""
