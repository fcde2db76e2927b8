"""A run small enough for tests: 200 of scikit-learn's digits, a narrow decoder, a few steps."""

from __future__ import annotations

import functools
from typing import Any

import torch

from dp2vae_fast.config import Config, load_config
from dp2vae_fast.runs.folder import RunFolder
from dp2vae_fast.runs.interrupt import StopRequest
from dp2vae_fast.runs.keys import take_keys
from dp2vae_fast.trainer import model_spec
from dp2vae_fast.vae.budget import plan_budget
from dp2vae_fast.vae.data import ImageData, load_images
from dp2vae_fast.vae.stage import Stage

SETTINGS: dict[str, Any] = {
    "width": 16,
    "latent_dim": 4,
    "expected_batch_size": 20,
    "steps": 6,
    "pretrain_steps": 5,
    "warm_start_steps": 5,
    "physical_batch_size": 16,
    "checkpoint_every": 2,
    "noise_multiplier": 1.0,
    "accountant": "rdp",
    "seed": 11,
}
"""Keyword settings for :class:`~dp2vae_fast.trainer.Trainer`."""

FLAGS = [f"--set={name}={value}" for name, value in SETTINGS.items() if name not in ("seed", "noise_multiplier")]
"""The same for the command line, with a secret key and the recipe's budget."""


@functools.cache
def digits(n: int = 200) -> ImageData:
    """The first ``n`` digits."""
    return load_images("digits").subset(torch.arange(n))


def config(**settings: Any) -> Config:
    """The digits recipe, shrunk."""
    return load_config(recipe="digits", overrides=within(SETTINGS, settings))


def within(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """``base`` changed by ``settings``, of which a target takes the place of a noise multiplier."""
    if settings.get("target_epsilon"):
        base = {name: value for name, value in base.items() if name != "noise_multiplier"}
    return base | settings


def stage(train: ImageData, settings: Config) -> Stage:
    """The circumstances of an in-memory run on ``train``."""
    run = RunFolder(None, resume=False, config=settings, data_sha256=train.sha256)
    device = torch.device("cpu")
    keys = take_keys(run.ledger, settings, train.sha256, device, None)
    budget = plan_budget(settings, len(train))
    spec = model_spec(settings, train)
    return Stage(settings, spec, train, budget, run, keys, device, StopRequest(), lambda progress: None)
