"""Benchmarks: each study is a command; `python -m benchmarks.report` writes pages and plots from its results.

speed       time and memory of forward and backward, ours beside floors and peers
precision   errors of every precision recipe            sparsity    what `sparse_grad` saves and costs
longrun     thousands of steps beside float64           invariance  which bits change with the batch
device      everything that only a GPU can tell         trainers    a step of TRL's trainer beside ours
roofline    predicted times                             stability   training runs

A study's `BLOCKS` say which parts of which pages it writes. `harness/` holds what studies share: workloads, timing,
memory, provenance, and `records`, `tables`, `pictures`, `blocks` and `cli`. `pytest benchmarks` runs the methods of the
speed study under pytest-benchmark.
"""
