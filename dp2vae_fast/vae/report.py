"""The privacy report: ``privacy.json`` and its readable twin ``privacy.md``, beside every released decoder.

The report says what is guaranteed, for whom, and under which assumptions. It is a function of the mechanisms
that the ledger counts and of public settings: nothing in it is computed from the records, not even a hash of
them, but for the verdict of an audit, where one was run: which checks passed comes from records without noise, and no
epsilon counts it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from pathlib import Path
from typing import Any

from ..engine.accounting import STAND_IN, Mechanism, epsilon, gaussian_dp_mu
from ..engine.precision import roundings_on, sum_rounding
from ..runs.checkpoint import RunError, write_json, write_text
from ..runs.environment import versions
from .encoder import EncoderMode
from .stage import Stage

NO_NOISE = "no noise was added: nothing is guaranteed, and the decoder must be treated like the records themselves"
ARITHMETIC: dict[str, dict[str, Any]] = {
    "fused": {
        "precision": "float32; moments in exact integer sums",
        "norms": "the clip factor divides by the computed norm plus a bound of its rounding error",
        "sums": "the rounding of the sum over records is part of the sensitivity; a record's product over positions "
        "is formed in float32, which the bound of its norm counts, or by the reference ops in float64",
        "not_bounded": "rounding of the forward and backward pass themselves",
    },
    "opacus": {
        "precision": "float32; moments in exact integer sums",
        "norms": "as Opacus computes them",
        "sums": "in float32",
        "not_bounded": "rounding of norms, of sums, and of the forward and backward pass",
    },
}
_COMPOSITION = "all mechanisms of all stages together"
NO_CLAIM = (
    "no claim is made against floating-point attacks",
    "checkpoints, loss curves and everything else under curator/ are not covered and must not be released",
    "other runs on the same records are not counted here: each release adds what it spent, and so does a choice of "
    "settings, or of a run among several, by results on these records",
)


@dataclass(frozen=True)
class Facts:
    """What the report is made from. ``mechanisms`` are those the ledger counts, ``step_mechanism`` names
    DP-SGD of stage 2."""

    mechanisms: tuple[Mechanism, ...]
    step_mechanism: str
    delta: float
    accountant: str
    encoder: str
    end_to_end: bool
    statement: str
    noise_source: str
    dataset_size: int
    sampling: dict[str, Any]
    clipping: dict[str, Any]
    public_constants: dict[str, Any]
    arithmetic: dict[str, Any]
    noise_keys: int = 1
    audit: str = "not run"
    warnings: tuple[str, ...] = ()


def report_on(stage: Stage, mode: EncoderMode, warnings: Sequence[str]) -> dict[str, Any]:
    """The report of a finished run: what its ledger counts, and the public settings it counted under."""
    privacy, data, train = stage.config.privacy, stage.config.data, stage.train
    engine = stage.config.performance.engine
    rounding = sum_rounding(privacy.expected_batch_size, roundings=roundings_on(stage.device))
    constants: dict[str, Any] = {
        "image_shape": list(train.image_shape),
        "classes": stage.spec.num_classes,
        "split": f"a permutation by seed {data.split_seed} that depends on the number of records only",
    }
    if stage.budget.stage1:
        constants |= {name: getattr(privacy, name) for name in ("pixel_center", "mean_clip", "residual_clip")}
    if privacy.public_encoder:
        constants["public_encoder"] = privacy.public_encoder
    return build_report(
        Facts(
            mechanisms=stage.run.ledger.spent(),
            step_mechanism=stage.budget.step.name,
            delta=privacy.target_delta,
            accountant=privacy.accountant,
            encoder=privacy.encoder,
            end_to_end=mode.end_to_end,
            statement=mode.statement,
            noise_source="secret" if privacy.seed is None else "seeded",
            dataset_size=len(train),
            sampling={
                "scheme": "Poisson: every record enters every step on its own secret coin",
                "rate": privacy.expected_batch_size / len(train),
                "expected_batch_size": privacy.expected_batch_size,
            },
            clipping={
                "mode": "flat, over all trainable parameters together",
                "max_grad_norm": privacy.max_grad_norm,
                "sensitivity": privacy.max_grad_norm * (1 + (rounding if engine == "fused" else 0)),
                "records": f"one unit each, {stage.config.model.iwae_samples} row(s) a record",
            },
            public_constants=constants,
            arithmetic=ARITHMETIC[engine],
            noise_keys=stage.run.ledger.key_number + 1,
            audit=_verdict(stage.run.curator_file("audit.json")),
            warnings=tuple(warnings),
        )
    )


def _verdict(file: Path | None) -> str:
    """The verdict of the run's audit, or that there was none."""
    if file is None or not file.exists():
        return Facts.audit
    try:
        return json.loads(file.read_text(encoding="utf-8"))["verdict"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} cannot be read as an audit: delete it, resume, and audit again") from error


def build_report(facts: Facts) -> dict[str, Any]:
    """The content of ``privacy.json``.

    ``epsilon`` is the record-level epsilon of the released decoder under add/remove neighbouring, composed
    over all mechanisms of all stages; null when there is none: for the encoder mode ``private``
    (``epsilon_given_encoder`` then states what DP-SGD alone gives to a fixed encoder) and for runs without
    noise.
    """
    spent = tuple(m for m in facts.mechanisms if m.steps > 0)
    composed = _finite(epsilon(spent, facts.delta, facts.accountant))
    noiseless = composed is None
    end_to_end = facts.end_to_end and not noiseless
    report: dict[str, Any] = {
        "epsilon": composed if end_to_end else None,
        "delta": facts.delta,
        "neighbouring": "add/remove one record",
        "encoder": facts.encoder,
        "end_to_end": end_to_end,
        "statement": NO_NOISE if noiseless else facts.statement,
        "mechanisms": _rows(spent, facts.delta, facts.accountant),
        "noise_source": facts.noise_source,
        "noise_keys": facts.noise_keys,
        "accountant": {
            "name": facts.accountant,
            "library": "opacus",
            "composition": f"{_COMPOSITION}; {STAND_IN}" if facts.accountant == "prv" else _COMPOSITION,
        },
        "released": ["decoder.safetensors", "decoder.json", "samples.png", "privacy.json", "privacy.md"],
        "sampling": facts.sampling,
        "dataset_size": {"value": facts.dataset_size, "origin": "read from the data, assumed public"},
        "public_constants": facts.public_constants,
        "clipping": facts.clipping,
        "arithmetic": facts.arithmetic,
        "not_claimed": list(NO_CLAIM),
        "warnings": list(facts.warnings),
        "audit": facts.audit,
        "versions": versions(),
    }
    if not end_to_end:
        given = [m for m in spent if m.name == facts.step_mechanism]
        report["epsilon_given_encoder"] = _finite(epsilon(given, facts.delta, facts.accountant))
    return report


def _rows(mechanisms: Sequence[Mechanism], delta: float, accountant: str) -> list[dict[str, Any]]:
    """One row per mechanism: its parameters, its epsilon on its own, and its share of the budget in squared
    Gaussian-DP units."""
    alone = [_finite(epsilon([m], delta, accountant)) for m in mechanisms]
    costs = [math.inf if e is None else 0.0 if e == 0 else gaussian_dp_mu(e, delta) ** 2 for e in alone]
    total = sum(costs)
    return [
        {
            "name": m.name,
            "noise_multiplier": m.noise_multiplier,
            "sample_rate": m.sample_rate,
            "steps": m.steps,
            "epsilon_alone": e,
            "share": cost / total if math.isfinite(total) and total > 0 else None,
            **m.detail,
        }
        for m, e, cost in zip(mechanisms, alone, costs, strict=True)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def render(report: dict[str, Any]) -> str:
    """``privacy.md``: the same report for readers."""
    lines = [
        "# Privacy report",
        "",
        f"**{headline(report)}**",
        "",
        report["statement"][:1].upper() + report["statement"][1:] + ".",
        "",
    ]
    lines += [f"> Warning: {warning}." for warning in report["warnings"]] + ([""] if report["warnings"] else [])
    lines += [
        "## What was spent",
        "",
        "| mechanism | noise multiplier | sampling rate | steps | ε alone | share of the budget |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in report["mechanisms"]:
        share = "" if row["share"] is None else f"{100 * row['share']:.1f} %"
        cells = (
            row["name"],
            f"{row['noise_multiplier']:.4g}",
            f"{row['sample_rate']:.4g}",
            row["steps"],
            _number(row["epsilon_alone"]),
            share,
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += [
        "",
        f"Composed by Opacus' {report['accountant']['name'].upper()} accountant: "
        f"{report['accountant']['composition']}.",
        "",
    ]
    lines += ["## Under which assumptions", ""]
    lines += [f"- Neighbouring data sets: {report['neighbouring']}."]
    lines += [f"- Noise: {_noise_sentence(report)}"]
    size = report["dataset_size"]
    lines += [f"- Number of training records: {size['value']} ({size['origin']})."]
    for title in ("sampling", "clipping", "public_constants", "arithmetic"):
        content = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in report[title].items())
        lines.append(f"- {title.replace('_', ' ').capitalize()}: {content}.")
    lines += ["", "## What this does not cover", ""]
    lines += [f"- {sentence[:1].upper()}{sentence[1:]}." for sentence in report["not_claimed"]]
    lines += [f"- Audit: {report['audit']}."]
    lines += ["", "## What is released", "", ", ".join(report["released"]) + "."]
    lines += [
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def headline(report: dict[str, Any]) -> str:
    """The guarantee, or that there is none, in one sentence."""
    bound, delta = report["epsilon"], _rounded_up(report["delta"], 6)
    if bound is not None:
        guarantee = f"({_rounded_up(bound)}, {delta})-differentially private"
        return f"The released decoder is {guarantee} for every training record."
    given = report["epsilon_given_encoder"]
    if given is None:
        return "The released decoder is not private."
    return f"No finite ε holds end to end. Given the encoder, updates have ε = {_rounded_up(given)}, δ = {delta}."


def _noise_sentence(report: dict[str, Any]) -> str:
    if report["noise_source"] == "seeded":
        return (
            "drawn from a seed, for reproducibility. Whoever knows the seed can subtract the noise: "
            "the guarantee holds only while the seed is secret."
        )
    return "drawn with a secret key from the operating system that is kept in memory only."


def _number(value: float | None) -> str:
    return "∞" if value is None else _rounded_up(value)


def _rounded_up(value: float, digits: int = 4) -> str:
    """As few digits, and no less than holds."""
    return f"{float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(float(value)))):.{digits}g}"


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write ``privacy.json`` and ``privacy.md`` into ``folder``, each atomically."""
    write_json(folder / "privacy.json", report)
    write_text(folder / "privacy.md", render(report))
