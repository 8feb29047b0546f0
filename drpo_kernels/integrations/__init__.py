"""Adapters to trainers. The package imports none of them; a user imports the one that is needed."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs(package: str, requirement: str) -> Iterator[None]:
    """Wrap imports of a package that may not be installed. Raises an ImportError that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(f"{requirement} must be installed, got {error}: pip install '{requirement}'") from error
