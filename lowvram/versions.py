"""Which versions are installed, against the floors that the installed metadata declares.

The floors stand in pyproject.toml and nowhere else. Imports none of the packages.
"""

from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Package:
    """A package that is needed, and what is here of it.

    Attributes:
        needs: "torch>=2.10".
        version: the installed one; None where it is missing.
        state: "ok", "below" the floor, or "missing".
    """

    name: str
    needs: str
    version: str | None
    state: str


def requirements() -> list[str]:
    """What this package declares for this system, without the extras: "torch>=2.10".

    Raises:
        PackageNotFoundError: the package is not installed, only its source is here.
    """
    from packaging.requirements import Requirement

    found = []
    for text in metadata.requires("lowvram") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(f"{requirement.name}{requirement.specifier}")
    return found


def check(needs: str) -> Package:
    """Compare one of `requirements` with what is installed."""
    from packaging.requirements import Requirement

    requirement = Requirement(needs)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Package(requirement.name, needs, None, "missing")
    enough = requirement.specifier.contains(version, prereleases=True)
    return Package(requirement.name, needs, version, "ok" if enough else "below")


def check_python(version: str) -> Package:
    """The same for Python itself.

    Args:
        version: `platform.python_version()`.
    """
    from packaging.specifiers import SpecifierSet

    needs = metadata.metadata("lowvram")["Requires-Python"]
    enough = SpecifierSet(needs).contains(version, prereleases=True)
    return Package("python", f"python{needs}", version, "ok" if enough else "below")
