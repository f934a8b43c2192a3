"""Reads the versions of the installed dependencies and compares them with the bounds of the package.

A version outside its bounds can give wrong results without an error. With transformers before 5.23, a budget of 100 %
changes the output of a model.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from tokenprune import __version__


def read_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed.

    Args:
        package: name of the package on a package index.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def format_versions() -> str:
    """Return the versions of tokenprune, torch, transformers and Python, one per line."""
    versions = {"tokenprune": __version__, **{name: read_version(name) for name in ("torch", "transformers")}}
    versions["Python"] = platform.python_version()
    return "\n".join(f"{name} {value or 'is not installed'}" for name, value in versions.items())


def find_broken_bounds(requirements: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package whose version is out of bounds, by requirement.

    Packages that are not installed are skipped, because their import raises an error that names them.

    Args:
        requirements: requirements as in ``pyproject.toml``, such as ``"torch>=2.6"``; those of extras are skipped.
    """
    bounds = {}
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = read_version(requirement.name)
        if installed is not None and not requirement.specifier.contains(installed, prereleases=True):
            bounds[f"{requirement.name}{requirement.specifier}"] = installed
    return bounds


def format_broken_bounds(bounds: Mapping[str, str]) -> str:
    """Return an error message about versions that are out of bounds.

    Args:
        bounds: the installed versions by requirement.
    """
    faults = "; ".join(f"{requirement}, but {installed} is installed" for requirement, installed in bounds.items())
    return f"tokenprune needs {faults}; run: {shlex.join(['pip', 'install', '-U', *bounds])}"


@cache
def check_dependencies() -> None:
    """Raise an error if the version of a dependency is out of the bounds of the installed package.

    Raises:
        RuntimeError: if a bound is broken; it names the required and the installed versions.
    """
    try:
        requirements = requires("tokenprune") or []
    except PackageNotFoundError:  # the package runs from a checkout that is not installed
        return
    if bounds := find_broken_bounds(requirements):
        raise RuntimeError(format_broken_bounds(bounds))
