"""What goes wrong in DP-SGD engines, side by side: Opacus' hooks, Opacus' ghost clipping, and this package.

    python benchmarks/faults.py [--only WORDS] [--record FILE]

Every scenario trains a tiny model through ``make_private``, from a fixed seed, and is judged by an oracle that knows
nothing of the engines (``fault_harness.py``). The record goes to ``results/faults.json``, its table to
``docs/faults.md`` (``report.py``). With ``--only`` nothing is recorded.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import fault_calls
import fault_layers
import fault_loops
import fault_losses
import fault_models
import torch
from environment import environment
from fault_harness import ENGINES, Outcome, outcome

SCENARIOS = [
    scenario
    for room in (fault_layers, fault_models, fault_calls, fault_losses, fault_loops)
    for scenario in room.SCENARIOS
]


def line(name: str, found: Outcome, width: int = 110) -> str:
    return f"    {name:13s} {found.verdict:13s}{found.detail}"[:width]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for scenario in SCENARIOS:
        if arguments.only not in scenario.name:
            continue
        print(scenario.name, flush=True)
        outcomes = {engine: outcome(scenario, engine) for engine in ENGINES}
        for engine, found in outcomes.items():
            print(line(engine, found), flush=True)
        rows.append(
            {
                "scenario": scenario.name,
                "why": scenario.why,
                "fault": scenario.fault,
                "outcomes": {engine: asdict(found) for engine, found in outcomes.items()},
            }
        )
    if not arguments.only:
        record = {"environment": environment(), "rows": rows}
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
