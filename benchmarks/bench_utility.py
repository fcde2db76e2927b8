"""Utility at equal epsilon: how well classifiers do on held-out digits that were trained on samples alone.

    python benchmarks/bench_utility.py [--seeds 5] [--only linear dp]

Every row is trained for every seed as the ``digits`` recipe says, except for what the row names; 5,000 samples train a
small CNN and a logistic regression, which are tested on 360 held-out real digits. A row is refused unless its report
states the epsilon that it is listed under. Writes ``results/utility_digits.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from environment import environment

from dp2vae_fast import Trainer

RESULTS = Path(__file__).parent / "results" / "utility_digits.json"
SAMPLES = 5000
FIGURES = ("cnn_accuracy_synthetic", "logreg_accuracy_synthetic", "cnn_accuracy_real", "logreg_accuracy_real")

# Modes that learn their latents step by step need larger steps than a decoder that starts warm; what is not trained
# with noise takes as many steps as it likes.
DP = {
    "encoder": "dp",
    "latent_dim": 32,
    "beta": 0.1,
    "learning_rate": 5e-3,
    "pretrain_learning_rate": 5e-3,
    "pretrain_steps": 400,
}
PRIVATE = {"encoder": "private", "latent_dim": 32, "beta": 0.3, "learning_rate": 5e-3, "pretrain_steps": 1000}
WITHOUT_NOISE = {"noise_multiplier": 0, "max_grad_norm": 100.0, "learning_rate": 1e-3, "steps": 2000}
ROWS: dict[str, dict[str, Any]] = {
    "linear, ε = 10": {"target_epsilon": 10},
    "linear, ε = 1": {"target_epsilon": 1},
    "dp, ε = 10": DP | {"target_epsilon": 10},
    "dp, ε = 1": DP | {"target_epsilon": 1},
    "private, ε = 10 given the encoder": PRIVATE | {"target_epsilon": 10},
    "private, ε = 1 given the encoder": PRIVATE | {"target_epsilon": 1, "beta": 1.0},
    "linear, no noise": WITHOUT_NOISE,
    "private, no noise": PRIVATE | WITHOUT_NOISE | {"beta": 0.1, "pretrain_steps": 2000},
}


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run: its figures, the epsilon of its report, and seconds of training."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a row is not private is its very point
        run = Trainer(recipe="digits", seed=seed, **settings).fit()
    seconds = time.perf_counter() - started
    report = run.report
    stated = report["epsilon"] if report["end_to_end"] else report["epsilon_given_encoder"]
    target = settings.get("target_epsilon")
    if target is not None and not 0.97 * target <= stated <= target:
        raise SystemExit(f"the report states epsilon = {stated}, expected {target}: not recorded")
    metrics = run.evaluate(samples=SAMPLES, seed=seed)
    figures = {name: metrics[name] for name in FIGURES} | {"fid": metrics["fid"], "fid_real": metrics["fid_real"]}
    return figures | {"seed": seed, "epsilon": stated, "end_to_end": report["end_to_end"], "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="words that a row must begin with")
    arguments = parser.parse_args()
    chosen = [row for row in ROWS if not arguments.only or row.startswith(tuple(arguments.only))]
    made = environment()
    record = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() and arguments.only else {"samples": SAMPLES, "rows": {}}
    )
    for row in chosen:
        runs = [measure(ROWS[row], seed) for seed in range(arguments.seeds)]
        record["rows"][row] = {"settings": ROWS[row], "environment": made, "runs": runs}
        accuracies = [r["cnn_accuracy_synthetic"] for r in runs]
        print(f"{row}: cnn {statistics.median(accuracies):.3f} {sorted(round(a, 3) for a in accuracies)}", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
