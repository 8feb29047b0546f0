"""Benchmarks: `python -m benchmarks.cpu` measures, `python -m benchmarks.report` writes the README's table from it.

workloads   shapes and inputs             methods     what is compared, each the same loss from the same inputs
exact       float64 gradients             timing      interleaved samples in one process
memory      peak of one fresh process     provenance  device, versions, commit

`python -m benchmarks.precision` measures docs/precision.md: regimes and recipes, mismatch, precision_tables and _plots.
"""
