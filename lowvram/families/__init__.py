"""The families of models, one file each; the registry lists this folder."""

import importlib
import pkgutil
from functools import cache

from lowvram.families.family import Family


@cache
def all_families() -> dict[str, Family]:
    """Every family by its name, found by listing this folder."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "family"]
    found = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in sorted(names)]
    return {family.name: family for family in found}
