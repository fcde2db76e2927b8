"""Plots of ``results/scaling_cpu.json`` into ``results/plots``: step time and peak memory along each axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report_step import NOT_MEASURED, OURS, against_rivals, busy, ok, part_of

FOLDER = Path(__file__).parent / "results" / "plots"
AXES = {
    "batch of W1-decoder": "records in the batch",
    "batch of W2-decoder": "records in the batch",
    "size": "pixels a side",
    "width": "parameters",
    "depth": "convolutions a level",
}
FIGURES = {"p50_ms": "ms a step", "peak_mib": "peak of a step above set-up, MiB"}


def file_of(part: str) -> Path:
    return FOLDER / f"{part.replace(' ', '_')}.svg"


def captions(record: dict[str, Any]) -> str:
    """Every plot that there is, with its caption."""
    return "\n\n".join(caption(record, part) for part in measured(record)) or NOT_MEASURED


def caption(record: dict[str, Any], part: str) -> str:
    """The plot as Markdown, and under it where ours loses, and what it costs over the non-private step."""
    points = part_of(record, part)["points"]
    file = file_of(part)
    lines = [f"![Step time and peak memory against {AXES[part]}](../benchmarks/results/plots/{file.name})", ""]
    for figure, what in {"ratio": "Time", "peak_mib": "Memory"}.items():
        said = [(point["value"], against_rivals(point, record["titles"], figure)) for point in points]
        lost = [f"at {value}: {text}" for value, text in said if text.startswith("**")]
        lines.append(f"{what}: {'; '.join(lost) if lost else 'no other private step was better at any point'}.")
    over = [f"{r['ratio']:.2f} at {point['value']}" for point in points if (r := ok(point, OURS)) and "ratio" in r]
    lines.append(f"Ours over the non-private step: {', '.join(over)}.")
    skipped = {
        f"{record['titles'][name]} {result['status']} ({result['why']})"
        for point in points
        for name, result in point["variants"].items()
        if result["status"] != "ok"
    }
    return "\n".join([*lines, *(f"Not shown: {text}." for text in sorted(skipped)), *busy(points)])


def draw(record: dict[str, Any]) -> None:
    """Every plot whose part has been measured, the same to the byte for the same record and version of matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    FOLDER.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "dp2vae_fast", "svg.fonttype": "none", "font.size": 9}):
        for part in measured(record):
            figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
            for panel, (entry, label) in zip(panels, FIGURES.items(), strict=True):
                for index, (name, title) in enumerate(record["titles"].items()):
                    _curve(panel, part_of(record, part)["points"], name, title, entry, part == "width", f"C{index}")
                panel.set(xscale="log", yscale="log", xlabel=AXES[part], ylabel=label)
                ticks = {p["parameters"] if part == "width" else p["value"] for p in part_of(record, part)["points"]}
                panel.set_xticks(sorted(ticks), [f"{t / 1e6:.2g} M" if t > 1e5 else str(t) for t in sorted(ticks)])
                panel.xaxis.set_minor_locator(NullLocator())
                panel.grid(alpha=0.3)
            panels[0].legend(fontsize=7)
            figure.suptitle(f"{part}: {AXES[part]}")
            figure.savefig(file_of(part), metadata={"Date": None})
            plt.close(figure)


def measured(record: dict[str, Any]) -> list[str]:
    return [row["part"] for row in record["rows"] if row["part"] in AXES]


def _curve(
    panel: Any, points: list[dict[str, Any]], name: str, title: str, entry: str, wide: bool, colour: str
) -> None:
    along = [(p["parameters"] if wide else p["value"], r[entry]) for p in points if (r := ok(p, name))]
    if along:
        width = 2.2 if name == OURS else 1.2
        panel.plot(*zip(*along, strict=True), marker="o", markersize=3, linewidth=width, label=title, color=colour)
