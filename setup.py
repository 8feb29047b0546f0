"""For tools that still run setup.py; pyproject.toml says everything."""

from setuptools import setup

setup()
