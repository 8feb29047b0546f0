"""Predicted time and memory of every method on chips we may never hold; `python -m benchmarks.roofline`."""
