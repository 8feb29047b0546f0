"""Predicted time and memory of our methods and of plain PyTorch on chips that are not here, and what was measured."""
