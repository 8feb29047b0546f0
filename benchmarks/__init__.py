"""Benchmarks: `python -m benchmarks.speed` measures, `python -m benchmarks.report` writes tables and plots from it.

method      what an implementation is          methods, peers   the implementations
workloads   models' shapes, inputs             plans            which of them on what, with which rows active
exact       float64 gradients, verdicts        measure          the one measuring loop, with a time budget
memory      peaks                              timing           interleaved samples in one process
provenance  device, versions, commit           speed_tables, speed_plots   what the report writes and draws

`python -m benchmarks.device` is everything that only a GPU can tell, in three sittings: device_parts, device_measures
and tiles measure, bars and device_summary judge, device_results reads it back; gpu_page, gpu_findings and
gpu_plots make pages of it. `python -m benchmarks.roofline` predicts what is not measured; `python -m
benchmarks.stability` trains.

`pytest benchmarks` runs each under pytest-benchmark. `python -m benchmarks.precision` measures docs/precision.md:
regimes and recipes, mismatch, precision_tables and _plots.
"""
