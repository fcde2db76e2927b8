"""The architecture: each floor imports only what lies below it, and the README says what the records say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import from itself and from the rooms before it. The Triton kernels, in a folder of their own, are "ops".
FLOORS = ["config", "ops", "engine", "runs", "vae", "doors"]


def dotted(file: Path) -> list[str]:
    """Name of a module of the package, in its parts."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return [*parts] if parts[0] == "dp2vae_fast" else ["dp2vae_fast", *parts]


def room_of(module: list[str]) -> str | None:
    """Of a module of the package; None for any other, and for the compiled one, which imports nothing."""
    own = module[1] if len(module) > 1 else ""
    if module[0] != "dp2vae_fast" or own == "_C":
        return None
    return "ops" if own == "kernels" else own if own in FLOORS else "doors"


def imports(file: Path) -> list[list[str]]:
    """Everything that a file imports, by its dotted name."""
    here, found = dotted(file)[:-1], []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            found += [[*path, alias.name] for alias in node.names]
    return found


MODULES = sorted(file for folder in ("dp2vae_fast", "kernels") for file in (ROOT / folder).rglob("*.py"))
BELOW = [file for file in MODULES if room_of(dotted(file)) != "doors"]  # the doors may import everything


def test_every_floor_is_looked_at():
    assert {room_of(dotted(file)) for file in MODULES} == set(FLOORS) and ROOT / "kernels" / "norm.py" in BELOW


@pytest.mark.parametrize("file", BELOW, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_floor_imports_only_what_lies_below_it(file):
    above = FLOORS[FLOORS.index(room_of(dotted(file))) + 1 :]
    assert not [".".join(name) for name in imports(file) if room_of(name) in above]


def test_the_readme_says_what_the_records_say():
    check = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
