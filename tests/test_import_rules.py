"""Who may import whom: the rules of the architecture, read from the source and tried for real.

Run: scripts/test tests/test_import_rules.py

Every file under lowvram/ is covered as soon as it exists. An import counts wherever it stands, in a
function or under TYPE_CHECKING too; only the rule against heavy packages looks at what runs when
the module is imported, since what orchestrates starts fast and may reach for torch later.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "diffusers", "transformers", "bitsandbytes"}
# What may import them at module level; all else orchestrates, and starts fast.
COMPUTES = {"stages", "weights", "memory", "pixels", "component", "selftests", "demo"}
FORBIDDEN = {
    "families": {"weights"},
    "weights": {"families"},
    "memory": {"families", "weights", "pixels", "stages"},
    "pixels": {"families", "weights"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package's own is `….__init__`."""
    files = sorted((ROOT / "lowvram").rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


MODULES = modules()


def area(module: str) -> str:
    """The folder or file directly under lowvram/ that a module lies in."""
    return module.split(".")[1] if module.startswith("lowvram.") else ""


def violations(module: str, source: str) -> list[str]:
    """What `source`, standing at `module`, imports against the rules; one sentence each."""
    tree = ast.parse(source)
    own = area(module)
    areas = {area(name) for name in imported(module, ast.walk(tree))}
    found = [f"{module} imports {other}" for other in sorted(areas & FORBIDDEN.get(own, set()))]
    if own != "stages" and {"families", "weights"} <= areas:
        found.append(f"{module} brings families and weights together")
    if own not in COMPUTES:
        at_start = {name.split(".")[0] for name in imported(module, run_on_import(tree))}
        found += [f"{module} imports {name} at module level" for name in sorted(at_start & HEAVY)]
    return found


def imported(module: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted name of everything that the import statements among `nodes` may import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes under `node` that run at import: no function bodies, nothing for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            child = ast.Module(child.orelse, [])
        yield child
        yield from run_on_import(child)


def heavy_after(code: str) -> set[str]:
    """The heavy packages that are loaded once `code` has run in a fresh interpreter."""
    report = "\nimport sys; print('loaded:', *sorted(sys.modules.keys() & set(sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-c", code + report, *sorted(HEAVY)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_the_rules(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("lowvram.families.a", "from lowvram.weights import whole", "imports weights"),
        ("lowvram.families.a", "from lowvram import weights", "imports weights"),
        ("lowvram.families.a", "from ..weights.whole import Whole", "imports weights"),
        ("lowvram.weights.a", "def f():\n    import lowvram.families.b", "imports families"),
        ("lowvram.weights.__init__", "from ..families import b", "imports families"),
        ("lowvram.memory.a", "from .. import weights", "imports weights"),
        ("lowvram.memory.a", "def f():\n    from lowvram.pixels import png", "imports pixels"),
        ("lowvram.pixels.a", "if TYPE_CHECKING:\n    import lowvram.families", "imports families"),
        ("lowvram.run", "from . import families\nfrom .weights import whole", "together"),
        ("lowvram.run", "import os, torch.nn as nn", "imports torch at module level"),
        ("lowvram.cli.parse", "try:\n    from diffusers import x\nexcept E: ...", "diffusers at"),
        ("lowvram.families.a", "class A:\n    from transformers import x", "transformers at"),
        ("lowvram.families.a", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "torch at"),
    ],
)
def test_a_broken_rule_is_found(module: str, source: str, broken: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert broken in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowvram.stages.a", "import torch\nfrom lowvram import families, weights"),
        ("lowvram.component", "import torch\nfrom lowvram.weights import whole"),
        ("lowvram.weights.a", "import torch\nfrom . import checkpoint"),
        ("lowvram.families.a", "def f():\n    import torch"),
        ("lowvram.families.a", "if TYPE_CHECKING:\n    import torch"),
        ("lowvram.run", "import torchlike\nfrom lowvram.families import family"),
    ],
)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source) == []


ORCHESTRATES = [m for m in MODULES if area(m) not in {*COMPUTES, "__main__"}]  # that one would run


@pytest.mark.parametrize("module", ["lowvram", *ORCHESTRATES])
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    assert heavy_after(f"import {module.removesuffix('.__init__')}") == set()


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, lowvram.cli as c\nold, sys.argv = sys.argv, ['lowvram', '--help']\n"
    code += "try:\n    c.main()\nexcept SystemExit as e:\n    assert not e.code\nsys.argv = old"
    assert heavy_after(code) == set()


def test_a_heavy_import_is_noticed() -> None:
    code = "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')"
    assert heavy_after(code) == {"torch"}
