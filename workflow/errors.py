"""The error of a mistake in the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A mistake in the configuration; the message names the place, the value and the valid choices."""


@contextmanager
def place(where: str) -> Iterator[None]:
    """Turn a ValueError or an OSError raised inside into a ConfigError that names the place in the configuration."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from None
