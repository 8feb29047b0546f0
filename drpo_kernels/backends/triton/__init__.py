"""The Triton backend: kernels, their launches, tile choice, and what is compiled ahead of time."""
