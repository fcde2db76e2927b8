"""Tables of whole training steps, from the records of ``bench_step.py`` and ``bench_scaling.py``.

What is lost is said where it is lost, and computed: nothing here is typed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
NOT_MEASURED = "Not measured yet."
BASE, OURS = "non-private", "ours"
BUSY = 0.1
SMALL = (  # rows of the README; channels last among them, which can be the fastest plain step
    "non-private-channels-last",
    "ours",
    "ours-channels-last",
    "opacus-hooks",
    "opacus-functorch",
    "opacus-ghost",
    "fastdp-mixopt",
    "vmap",
)


def is_private(name: str) -> bool:
    return not name.startswith(BASE)


def is_rival(name: str) -> bool:
    return is_private(name) and not name.startswith(OURS)


def ok(row: Row, name: str) -> Row | None:
    """The result of a variant that got through."""
    result = row["variants"].get(name)
    return result if result and result["status"] == "ok" else None


def fastest(row: Row, which: Callable[[str], bool], figure: str = "ratio") -> str | None:
    """The variant with the smallest ``figure`` among those that got through."""
    found = {name: r[figure] for name in row["variants"] if which(name) and (r := ok(row, name)) and figure in r}
    return min(found, key=found.__getitem__) if found else None


def against_rivals(row: Row, titles: dict[str, str], figure: str = "ratio") -> str:
    """Ours, as it comes, against the best of the other private ones: a gain, or in bold a loss."""
    mine, rival = ok(row, OURS), fastest(row, is_rival, figure)
    if mine is None:
        return f"**ours {row['variants'][OURS]['status']}**" if OURS in row["variants"] else ""
    if rival is None:
        return "no rival"
    gain = row["variants"][rival][figure] / mine[figure]
    return f"{gain:.2f} ({titles[rival]})" if gain >= 1 else f"**{gain:.2f} ({titles[rival]}), a loss**"


def step_times(record: Row) -> str:
    """For each number of threads and allocator: times over the non-private step's beside it, one column a workload."""
    return _by_setting(record, _times)


def step_memory(record: Row) -> str:
    """Peak memory of a step above set-up, in MiB."""
    return _by_setting(record, _memory)


def step_small(record: Row) -> str:
    """One thread and the default allocator, the usual contestants."""
    rows = [row for row in record["rows"] if (row["threads"], row["malloc"]) == (1, "default")]
    return "\n".join([*_times(rows, record["titles"], SMALL), "", f"{NOTE} {made(record)}"])


NOTE = (
    "A step's time over that of the non-private step beside it, medians, all with `Adam(fused=True)`; last line: the "
    "fastest other private step over ours."
)


def _by_setting(record: Row, table: Callable[..., list[str]]) -> str:
    lines: list[str] = []
    for setting in dict.fromkeys(map(_setting, record["rows"])):
        rows = [row for row in record["rows"] if _setting(row) == setting]
        lines += [f"**{setting}**", "", *table(rows, record["titles"]), ""]
    return "\n".join([*lines, made(record)])


def _setting(row: Row) -> str:
    return f"{row['threads']} thread{'s' * (row['threads'] > 1)}, {row['malloc']} malloc"


def _header(rows: list[Row]) -> list[str]:
    names = [row["workload"] + ("†" if row["cores_used_elsewhere"] >= BUSY else "") for row in rows]
    return [f"| | {' | '.join(names)} |", "|---" * (1 + len(rows)) + "|"]


def busy(rows: list[Row]) -> list[str]:
    """A line on how much of the machine others used, if it was much."""
    worst = max((row["cores_used_elsewhere"] for row in rows), default=0.0)
    return ["", f"† Others used up to {worst:g} cores of the machine meanwhile."] if worst >= BUSY else []


def _times(rows: list[Row], titles: dict[str, str], names: tuple[str, ...] = ()) -> list[str]:
    lines = _header(rows)
    base = [ok(row, BASE) for row in rows]
    milliseconds = [f"{b['p50_ms']:.1f}" if b else "" for b in base]
    lines.append(f"| {titles[BASE]}, ms | {' | '.join(milliseconds)} |")
    for name in names or [name for name in titles if name != BASE]:
        cells = [_cell(row, name, lambda r: f"{r['ratio']:.2f}" if "ratio" in r else "") for row in rows]
        if any(cells):
            lines.append(f"| {titles[name]} | {' | '.join(cells)} |")
    lines.append(f"| *fastest rival over ours* | {' | '.join(against_rivals(row, titles) for row in rows)} |")
    return lines + busy(rows)


def _memory(rows: list[Row], titles: dict[str, str]) -> list[str]:
    lines = _header(rows)
    for name in titles:
        cells = [_cell(row, name, lambda r: f"{r['peak_mib']:.0f}") for row in rows]
        if any(cells):
            lines.append(f"| {titles[name]} | {' | '.join(cells)} |")
    cells = [against_rivals(row, titles, "peak_mib") for row in rows]
    lines.append(f"| *smallest rival over ours* | {' | '.join(cells)} |")
    return lines


def _cell(row: Row, name: str, show: Callable[[Row], str]) -> str:
    result = row["variants"].get(name)
    if result is None:
        return ""
    return show(result) if result["status"] == "ok" else f"*{result['status']}*"


def floors(record: Row) -> str:
    """How little a private step could cost over the plain one, and of what that is made."""
    rows = {(row["workload"], _setting(row)): row for row in record["rows"]}
    settings = list(dict.fromkeys(setting for _, setting in rows))
    lines = [f"| | {' | '.join(settings)} |", "|---" * (1 + len(settings)) + "|"]
    for name in dict.fromkeys(name for name, _ in rows):
        cells = [
            "{ratio:.2f} ({norms_ms:.3g} + {noise_ms:.3g} of {plain_ms:.4g})".format_map(rows[name, setting])
            if (name, setting) in rows
            else ""
            for setting in settings
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = f"Floor over the plain step (norms and noise, of the plain step, in ms), {record['rounds']} rounds."
    return "\n".join([*lines, "", f"{note} {made(record)}"])


def why_not(record: Row) -> str:
    """Which variants were not timed, and why, each reason once."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in record["rows"]:
        for name, result in row["variants"].items():
            if result["status"] != "ok":
                where = reasons.setdefault((name, result["status"], result["why"]), [])
                where += [row["workload"]] * (row["workload"] not in where)
    lines = ["| | where | |", "|---|---|---|"]
    for (name, status, why), where in reasons.items():
        lines.append(f"| {record['titles'][name]} | {', '.join(where)} | {status}: {why.replace('|', '/')} |")
    return "\n".join(lines)


def part_of(record: Row, part: str) -> Row:
    """A part of the record of ``bench_scaling.py``; empty where it was not measured."""
    return next((row for row in record["rows"] if row["part"] == part), {})


def capacity(record: Row) -> str:
    """The largest batch that fits in memory."""
    part = part_of(record, "capacity").get("workloads", {})
    if not part:
        return NOT_MEASURED
    titles = record["titles"]
    names = [name for name in titles if any(name in results for results in part.values())]
    lines = [f"| | {' | '.join(part)} |", "|---" * (1 + len(part)) + "|"]
    for name in names:
        cells = [_cell({"variants": r}, name, _batch) for r in part.values()]
        lines.append(f"| {titles[name]} | {' | '.join(cells)} |")
    note = f"Largest batch, within 5 %, for which the process stays under {record['cap_gib']:g} GiB in a step"
    return "\n".join([*lines, "", f"{note}; *t*: larger ones take too long. {made(record)}"])


def _batch(result: Row) -> str:
    return f"{result['batch']:,}" + ("" if result["limited_by"] == "memory" else " *t*")


def fixed_cost(record: Row) -> str:
    """What a step costs beside its records: the straight line through small batches, by least squares."""
    points = part_of(record, "fixed").get("points", [])
    if not points:
        return NOT_MEASURED
    lines = ["| | fixed, ms a step | ms a record |", "|---|---|---|"]
    for name, title in record["titles"].items():
        found = [(point["value"], r["p50_ms"]) for point in points if (r := ok(point, name))]
        if len(found) > 2:
            fixed, each = line_through(found)
            lines.append(f"| {title} | {fixed:.2f} | {each:.2f} |")
    return "\n".join([*lines, *busy(points), "", f"W1-decoder, 1 to 8 records. {made(record)}"])


def line_through(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope, by least squares."""
    xs, ys = zip(*points, strict=True)
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a in xs)
    return y - slope * x, slope


def made(record: Row) -> str:
    """Where a record was made."""
    where = record["environment"]
    versions = where["versions"]
    machine = f"{where['gpu']['name']}; " if "gpu" in where else ""
    machine += f"{where['processor']}, {where['cores']} cores"
    others = f", FastDP {record['fastdp']}" if record.get("fastdp") else ""
    return f"{machine}, torch {versions['torch']}, opacus {versions['opacus']}{others}."
