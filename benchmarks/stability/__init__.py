"""Do losses clipped by the ratio break, and does DRPO hold, under staleness and mismatch? A small experiment.

`python -m benchmarks.stability` runs a grid of methods, settings and seeds. `python -m benchmarks.stability.report`
draws the pictures and writes docs/stability.md from the runs in bench_results/stability/.
"""
