"""Which fleetune this is."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def software() -> str:
    """Version of the installed fleetune; empty where it is not installed."""
    try:
        return version("fleetune")
    except PackageNotFoundError:
        return ""
