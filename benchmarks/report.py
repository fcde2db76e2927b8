"""Render the records in results/ as the tables of README and docs, between their ``<!-- NAME -->`` marks.

    python benchmarks/report.py [--check] [--from DIR]

``--check`` writes nothing and fails where a page does not say what the records say. ``--from`` prints the tables of
records that lie elsewhere, such as those of ``gpu.sh``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plots
import report_step
from report_step import made

HERE = Path(__file__).parent


def utility_digits(record: dict[str, Any]) -> str:
    """Accuracy on held-out digits after training on samples: medians over seeds."""
    lines = [
        "| encoder, budget (δ = 1e-5) | end to end | CNN | logistic regression | FID (small CNN) |",
        "|---|---|---|---|---|",
    ]
    for row, content in record["rows"].items():
        runs = content["runs"]
        claim = "yes" if runs[0]["end_to_end"] else "**no**"
        fid = statistics.median(next(iter(r["fid"].values())) for r in runs)
        cnn, logreg = (_spread(runs, f"{kind}_accuracy_synthetic") for kind in ("cnn", "logreg"))
        lines.append(
            f"| `{row.partition(',')[0]}`{row[len(row.partition(',')[0]) :]} | {claim} | {cnn} | {logreg} | {fid:.1f} |"
        )
    every = [r for content in record["rows"].values() for r in content["runs"]]
    cnn, logreg = (_spread(every, f"{kind}_accuracy_real", spread=False) for kind in ("cnn", "logreg"))
    fid = statistics.median(next(iter(r["fid_real"].values())) for r in every)
    lines.append(f"| *real training digits* | | {cnn} | {logreg} | {fid:.1f} (held-out digits) |")
    first = next(iter(record["rows"].values()))
    seeds = len(first["runs"])
    return "\n".join([*lines, "", f"Medians of {seeds} seeds, range in brackets; {made(first)}"])


def _spread(runs: list[dict[str, Any]], figure: str, *, spread: bool = True) -> str:
    values = [100 * r[figure] for r in runs]
    median = f"{statistics.median(values):.1f} %"
    return f"{median} ({min(values):.1f}–{max(values):.1f})" if spread else median


def noise_cpu(record: dict[str, Any]) -> str:
    """Noise and optimizer in one pass against ``normal_`` followed by the faster of PyTorch's optimizers."""
    isas = [step for step in record["rows"][0]["steps"] if step.startswith("one pass")]
    lines = [
        f"| parameters | optimizer | threads | {' | '.join(isas)} | normal_ + optimizer |",
        "|---" * (4 + len(isas)) + "|",
    ]
    for row in record["rows"]:
        medians = {step: times["p50_ms"] for step, times in row["steps"].items()}
        rival = min(medians[step] for step in medians if step.startswith("normal_"))
        cells = [f"{medians[isa]:.2f} ({rival / medians[isa]:.1f}x)" for isa in isas]
        lines.append(
            f"| {row['workload']} | {row['optimizer']} | {row['threads']} | {' | '.join(cells)} | {rival:.2f} |"
        )
    note = "Medians in ms a step, and how many times as fast as the faster of PyTorch's plain and fused optimizers"
    return "\n".join([*lines, "", f"{note}; {made(record)}"])


def faults(record: dict[str, Any]) -> str:
    """Scenario by scenario, what each engine made of it."""
    engines = list(record["rows"][0]["outcomes"])
    lines = [f"| scenario | {' | '.join(engines)} |", "|---" * (1 + len(engines)) + "|"]
    said = ""
    for row in record["rows"]:
        why = f": {row['why']}" if row["why"] != said else ""
        said = row["why"]
        cells = [_outcome(**row["outcomes"][engine]) for engine in engines]
        if row["fault"]:  # of this package, whose column is the last
            cells[-1] += f" ({row['fault']})"
        lines.append(f"| **{_plain(row['scenario'])}**{_plain(why)} | {' | '.join(cells)} |")
    for verdict in ("correct", "wrong"):
        found = [[row["outcomes"][engine]["verdict"] for row in record["rows"]].count(verdict) for engine in engines]
        lines.append(f"| *{verdict}, of {len(record['rows'])}* | {' | '.join(map(str, found))} |")
    return "\n".join([*lines, "", made(record)])


def _outcome(verdict: str, detail: str, width: int = 80) -> str:
    short = detail if len(detail) <= width else detail[:width].rsplit(maxsplit=1)[0] + " …"
    verdict = f"**{verdict}**" if verdict == "wrong" else verdict
    return f"{verdict}: {_plain(short)}" if detail else verdict


def _plain(text: str) -> str:
    """Text that Markdown must not read as its own."""
    return re.sub(r"([|<*_])", r"\\\1", text)


def register(record: dict[str, Any]) -> str:
    """A step of Opacus' engine as it is, and with this package's layer rules in its registries."""
    lines = ["| model | mode | as it is | registered | |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        stock, ours = (row["steps"][name]["p50_ms"] for name in ("as it is", "registered"))
        model = f"{row['model']} ({row['parameters'] / 1e6:.2f} M)"
        lines.append(f"| {model} | {row['mode']} | {stock:.1f} | {ours:.1f} | {stock / ours:.2f}x |")
    note = f"Medians in ms of processor time a step of {record['records']} records, float32, one thread"
    return "\n".join([*lines, "", f"{note}; {made(record)}"])


def opacus_suite(record: dict[str, Any]) -> str:
    """How many of Opacus' own tests apply to this engine, and pass."""
    passed, failed = record["total"]["passed"], record["total"]["failed"]
    return f"Of Opacus' own tests {passed + failed} apply to this engine; {passed} pass."


def bound(record: dict[str, Any]) -> str:
    """How far clip factors stay below C / norm on real gradients, and how far the sensitivity exceeds C."""
    lines = [
        "| decoder | data | norms | short, median | short, most | the same in bf16 | again in float64 | longest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault((row["preset"], row["norms"], row["data"]), []).append(row)
    for (preset, norms, data), rows in groups.items():
        plain, half = ([r for r in rows if r["precision"] == p] for p in ("float32", "bf16 autocast"))
        cells = [max(r[key] for r in plain) for key in ("short_median", "short_max")]
        both = [max(r[key] for r in half) for key in ("short_median", "short_max")]
        again, longest = (max(r[key] for r in rows) for key in ("again", "largest"))
        lines.append(
            f"| `{preset}`, width {record['widths'][preset]} | {data} | {norms} | {_percent(cells[0])} | "
            f"{_percent(cells[1])} | {_percent(both[0])}, {_percent(both[1])} | {100 * again:.0f} % | {longest:.6f} C |"
        )
    note = "The worse of two states, before and after training"
    lines += ["", f"{note}; {made(record)}", "", "| expected records | at most | sensitivity |", "|---|---|---|"]
    for row in record["sums"]:
        lines.append(f"| {row['expected']:,} | {row['at_most']:,} | C + {_percent(row['rounding'])} |")
    return "\n".join(lines)


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %"


def ops(record: dict[str, Any]) -> str:
    """Every op on every backend, and by other means, over its floor."""
    rows = [row for row in record["rows"] if "p50_ms" in row]
    hows = list(dict.fromkeys(row["how"] for row in rows))
    lines = [f"| op | on | floor, ms | {' | '.join(hows)} |", "|---" * (3 + len(hows)) + "|"]
    for op, what in dict.fromkeys((row["op"], row["what"]) for row in rows):
        found = {row["how"]: row for row in rows if (row["op"], row["what"]) == (op, what)}
        floor = next(iter(found.values()))["floor_ms"]
        cells = [
            f"{found[how]['p50_ms']:.3g} ({found[how]['p50_ms'] / floor:.1f})" if how in found else "" for how in hows
        ]
        lines.append(f"| `{op}` | {what} | {floor:.3g} | {' | '.join(cells)} |")
    where = "" if "gpu" in record["environment"] else ", one thread"
    note = f"Medians in ms{where}, and in brackets how many times the floor"
    return "\n".join([*lines, "", f"{note}; {made(record)}"])


def kernels(record: dict[str, Any]) -> str:
    """Registers a thread, bytes of shared memory a block and tensor-core instruction, by architecture."""
    rows = record["rows"]
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    lines = [f"| kernel | case | {' | '.join(architectures)} |", "|---" * (2 + len(architectures)) + "|"]
    for kernel, case in dict.fromkeys((row["kernel"], row["case"]) for row in rows):
        found = {row["architecture"]: row for row in rows if (row["kernel"], row["case"]) == (kernel, case)}
        cells = [
            ", ".join(str(x) for x in (row["registers"], row["shared"], row["mma"]) if x != "")
            for row in (found[name] for name in architectures)
        ]
        lines.append(f"| `{kernel}` | {case} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Compiled by Triton {record['triton']}; no kernel spills a register."])


Table = Callable[[dict[str, Any]], str]
STEP, SCALING = "step_cpu", "scaling_cpu"
# Page -> mark -> (record, what to make of it)
PAGES: dict[str, dict[str, tuple[str, Table]]] = {
    "README.md": {
        "utility_digits": ("utility_digits", utility_digits),
        "step_small": (STEP, report_step.step_small),
        "opacus_suite": ("opacus_suite", opacus_suite),
    },
    "docs/kernels.md": {"kernels": ("kernels", kernels)},
    "docs/faults.md": {"faults": ("faults", faults), "register": ("register", register)},
    "docs/privacy.md": {"bound": ("bound", bound)},
    "docs/benchmarks.md": {
        "step_times": (STEP, report_step.step_times),
        "floor": ("floor_cpu", report_step.floors),
        "step_memory": (STEP, report_step.step_memory),
        "why_not": (STEP, report_step.why_not),
        "capacity": (SCALING, report_step.capacity),
        "fixed_cost": (SCALING, report_step.fixed_cost),
        "scaling": (SCALING, plots.captions),
        "ops": ("ops_cpu", ops),
        "step_times_cuda": ("step_cuda", report_step.step_times),
        "step_memory_cuda": ("step_cuda", report_step.step_memory),
        "why_not_cuda": ("step_cuda", report_step.why_not),
        "ops_cuda": ("ops_cuda", ops),
        "noise_cpu": ("noise_cpu", noise_cpu),
    },
}


def read(record: str) -> dict[str, Any] | None:
    """A record, or None where there is none."""
    file = HERE / "results" / f"{record}.json"
    return json.loads(file.read_text()) if file.exists() else None


def rendered(page: str, text: str) -> str:
    """The text of a page with every marked table made anew from its record."""
    for name, (record, render) in PAGES[page].items():
        content = read(record)
        table = report_step.NOT_MEASURED if content is None else render(content)
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            raise SystemExit(f"{page} has no place for {name}: add <!-- {name} --> and <!-- end -->")
        text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


STEPS = {"Time": report_step.step_times, "Memory": report_step.step_memory, "Not timed": report_step.why_not}
BY_PREFIX = {"step_": STEPS, "ops_": {"Ops": ops}, "scaling_": {"The largest batch": report_step.capacity}}


def tables_of(folder: Path) -> Iterator[str]:
    """Headings and tables of the records in a folder that have rows."""
    for file in sorted(folder.glob("*.json")):
        for prefix, tables in BY_PREFIX.items():
            if file.name.startswith(prefix) and (record := json.loads(file.read_text()))["rows"]:
                yield from (f"## {title}, {file.name}\n\n{render(record)}" for title, render in tables.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--from", dest="folder", type=Path)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        return print("\n\n".join(tables_of(arguments.folder)))
    check = arguments.check
    scaling = read(SCALING)
    if scaling is not None and not check:
        plots.draw(scaling)
    for page in PAGES:
        file = HERE.parent / page
        text = file.read_text(encoding="utf-8")
        if check and rendered(page, text) != text:
            sys.exit(f"{page} is not what the records say: run benchmarks/report.py")
        if not check:
            file.write_text(rendered(page, text), encoding="utf-8")


if __name__ == "__main__":
    main()
