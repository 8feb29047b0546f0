"""Everything in this folder is marked `study`, so that `pytest -m "not study"` tests the product alone."""


def pytest_itemcollected(item):
    item.add_marker("study")
