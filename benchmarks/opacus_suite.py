"""Opacus' own test suite, run against this package's engine in mode "fused".

    python benchmarks/opacus_suite.py [--checkout PATH] [--examples 10] [-k EXPRESSION] [--engine opacus]

Takes the tests of the installed Opacus, or of a checkout, as they are, and puts ours in the place of theirs before they
are imported: `PrivacyEngine`, where every mode a test asks for becomes "fused", and the modules that fill
`p.grad_sample` (`GradSampleModule`, `wrap_model` and their kin), which fill it from :class:`Capture`. Nothing of theirs
is edited, and nothing of theirs is in this repository.

What is made of the outcome is written down in opacus_verdicts.py, and no test is left out because it fails:

* `NOT_APPLICABLE` names the tests that do not reach our code at all, or test a class of theirs that stays in place;
* `EXPLAINED` names the failures that are understood: (test, what the error says) -> why. A failure that no row explains
  is "unexplained", and the exit status is 1;
* a test that Opacus skips (GPUs, torchcsprng) is skipped here too. Nothing is downloaded: where torchvision is missing
  a few lines stand in for the random images and the batch-normalised networks that the tests take from it.

`--engine opacus` runs the same selection with nothing replaced, to see which tests fail by themselves. `--key torch`
takes the engine's key from torch's generator, to see which fail only because our noise is secret. Tests that read the
private gradient in `p.grad` need `materialize_grad=True`, which is set here; `--one-pass` leaves it off. Only a whole
run with none of these writes the record.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus_stand_ins import SEEN, replace_engine, stand_in_torchvision
from opacus_verdicts import EXPLAINED, NOT_APPLICABLE


class Referee:
    """The pytest plugin: leaves out what does not apply, and writes down what became of the rest."""

    def __init__(self, tests: Path) -> None:
        self.tests = tests
        self.not_applicable: dict[str, str] = {}
        self.outcomes: dict[str, str] = {}
        self.errors: dict[str, list[str]] = defaultdict(list)
        self.reasons: dict[str, str] = {}
        self.captured: Counter[str] = Counter()  # layer uses that a file's tests brought through our capture

    def name(self, nodeid: str) -> str:
        path, _, rest = nodeid.partition("::")
        return f"{path.rpartition('opacus/tests/')[2]}::{rest}"

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            name = self.name(item.nodeid)
            why = next((why for pattern, why in NOT_APPLICABLE if fnmatch.fnmatchcase(name, pattern)), None)
            if why is not None:
                self.not_applicable[name] = why
                item.add_marker(pytest.mark.skip(reason=f"not applicable: {why}"))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            name = self.name(report.nodeid)
            self.outcomes[name] = "failed"
            self.errors[name].append(str(report.longrepr).strip().splitlines()[-1])

    def pytest_runtest_setup(self) -> None:
        torch.set_default_dtype(torch.float32)  # one of the tests leaves another one behind

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = self.name(report.nodeid)
        self.captured[name.partition("::")[0]] += SEEN.pop("layer uses", 0)
        if report.failed:
            self.outcomes[name] = "failed"
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.errors[name].append(first_line(message))
        elif report.skipped and self.outcomes.get(name) != "failed":
            self.outcomes[name] = "not applicable" if name in self.not_applicable else "skipped"
            self.reasons[name] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.when == "call" and not hasattr(report, "context"):
            self.outcomes.setdefault(name, "passed")


def first_line(message: str) -> str:
    """The first line of an error that says something: Hypothesis hides the one that failed in a group of exceptions."""
    lines = [line.strip() for line in message.splitlines()]
    return next((line for line in lines if line), "")[:300]


def explain(name: str, errors: list[str]) -> list[dict[str, str]]:
    """One entry for each different error of a test, with its category and reason."""
    found = []
    for error in dict.fromkeys(errors):
        rows = (row for row in EXPLAINED if fnmatch.fnmatchcase(name, row[0]) and re.search(row[1], error))
        category, why = next(rows, ("", "", "unexplained", ""))[2:]
        found.append({"category": category, "why": why, "error": error})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="root of an Opacus checkout (default: the installed one)")
    parser.add_argument("--engine", choices=["fused", "opacus"], default="fused")
    parser.add_argument(
        "--key", choices=["secret", "torch"], default="secret", help="torch: torch.manual_seed repeats it"
    )
    parser.add_argument("--one-pass", action="store_true", help="leave materialize_grad at its default, False")
    parser.add_argument("--examples", type=int, default=10, help="Hypothesis examples a test")
    parser.add_argument("-k", dest="expression", default="", help="as pytest's; nothing is recorded")
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "results" / "opacus_suite.json")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()
    if arguments.checkout:
        sys.path.insert(0, str(arguments.checkout.resolve()))
    import hypothesis
    import opacus
    from environment import environment

    stood_in = stand_in_torchvision()
    if arguments.engine == "fused":
        replace_engine(arguments.key, arguments.one_pass)
    # The tests take these where they do not say otherwise; the same examples every time.
    hypothesis.settings.register_profile(
        "suite", max_examples=arguments.examples, derandomize=True, database=None, deadline=None
    )
    hypothesis.settings.load_profile("suite")
    warnings.simplefilter("ignore")
    tests = Path(opacus.__file__).parent / "tests"
    referee = Referee(tests)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=long" if arguments.verbose else "--tb=no"]
    options += [
        "-W",
        "ignore",
        "-c",
        "/dev/null",
        f"--rootdir={tests.parent.parent}",
        "--no-header",
        "--continue-on-collection-errors",
    ]
    pytest.main([*options, *(["-k", arguments.expression] if arguments.expression else []), str(tests)], [referee])

    files: dict[str, Any] = {}
    for name, outcome in sorted(referee.outcomes.items()):
        row = files.setdefault(name.partition("::")[0], {"collected": 0, "counts": Counter(), "failures": {}})
        row["collected"] += 1
        row["counts"][outcome] += 1
        if outcome == "failed":
            row["failures"][name.partition("::")[2]] = explain(name, referee.errors[name])
        else:
            why = referee.not_applicable.get(name) or referee.reasons.get(name)
            if why:
                row.setdefault("left_out", Counter())[why] += 1
    for file, row in files.items():
        row["layer_uses_captured"] = referee.captured[file]
    columns = ("passed", "failed", "skipped", "not applicable")
    print(f"\n| file | collected | {' | '.join(columns)} | layer uses |\n|---|{'---|' * (2 + len(columns))}")
    for file, row in files.items():
        counts = " | ".join(str(row["counts"][c]) for c in columns)
        print(f"| {file} | {row['collected']} | {counts} | {row['layer_uses_captured']} |")
    total = sum((row["counts"] for row in files.values()), Counter())
    print(f"| all | {sum(total.values())} | {' | '.join(str(total[c]) for c in columns)} | |\n")
    unexplained = 0
    for file, row in files.items():
        for name, found in row["failures"].items():
            for entry in found:
                unexplained += entry["category"] == "unexplained"
                print(f"{file}::{name}\n    {entry['category']}: {entry['why']}\n    {entry['error']}")
    usual = arguments.engine == "fused" and arguments.key == "secret" and not arguments.one_pass
    if usual and not arguments.expression:
        made = {**environment(), "opacus": opacus.__version__, "torchvision": "stand-in" if stood_in else "installed"}
        record = {"environment": made, "examples": arguments.examples, "total": total, "files": files}
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
