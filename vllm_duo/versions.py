"""Versions of installed packages, for results and reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed(*packages: str, otherwise: str = "not installed") -> dict[str, str]:
    """The version of each package.

    Args:
        packages: names as pip knows them.
        otherwise: what stands for a package that is not there.
    """
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = otherwise
    return found
