"""Benchmarks; README.md beside this file says which study answers which question."""
