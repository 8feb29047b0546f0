"""This adds the option of `pytest benchmarks`."""


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="a rehearsal of the benchmarks at tiny shapes")
