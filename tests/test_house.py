"""The architecture: each floor imports only what lies below it, and the README says what the records say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dp2vae_fast"
# A room may import from itself and from the rooms below it; config holds plain settings that every room may read.
FLOORS = ["ops", "engine", "runs", "vae", "doors"]


def room_of(module: str) -> str | None:
    """The room of a module of the package, by its dotted name."""
    parts = module.split(".")
    if parts[0] != "dp2vae_fast" or len(parts) == 1 or parts[1] in ("config", "_C", "kernels"):
        return None
    return parts[1] if parts[1] in FLOORS else "doors"


def imports(file: Path) -> list[str]:
    """Dotted names of everything that a file of the package imports from the package."""
    here = ["dp2vae_fast", *file.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            found += [".".join([*path, alias.name]) for alias in node.names]
    return [name for name in found if name.startswith("dp2vae_fast")]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_floor_imports_only_what_lies_below_it(file):
    own = room_of(".".join(["dp2vae_fast", *file.relative_to(PACKAGE).with_suffix("").parts]))
    if own is None or own == "doors":
        return
    above = FLOORS[FLOORS.index(own) + 1 :]
    assert not [name for name in imports(file) if room_of(name) in above]


def test_the_readme_says_what_the_records_say():
    check = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
