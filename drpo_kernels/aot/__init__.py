"""Compiling every kernel ahead of time, for chips that are not here, and reading the binaries."""
