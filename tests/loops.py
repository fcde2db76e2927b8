"""A model in a loop that draws its own batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dp2vae_fast import PrivacyEngine


def privatize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    engine: PrivacyEngine | None = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """What :meth:`PrivacyEngine.privatize` makes of the model and its optimizer, SGD unless given: without noise, for
    losses that are sums, unless ``options`` say otherwise."""
    settings: dict[str, Any] = dict(
        noise_multiplier=0.0, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=8, loss_reduction="sum"
    )
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return (engine or PrivacyEngine()).privatize(model, optimizer, **(settings | options))
