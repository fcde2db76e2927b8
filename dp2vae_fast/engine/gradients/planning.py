"""The plan of a model before it is trained: what ``dp2vae plan`` prints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..capture.capture import Capture
from .plan import Plan


def plan_for(module: nn.Module, *inputs: Any, plan: Plan | None = None, rows_per_record: int = 1) -> Plan:
    """The plan that a step on inputs of these shapes makes; their numbers do not matter, and nothing is trained.

    Args:
        module: the plain model, not yet private.
        inputs: arguments of its forward, the batch first.
        plan: one to fill; the default one unless given.
    """
    capture = Capture(module, plan=plan, rows_per_record=rows_per_record, verify=False)
    training = module.training
    try:
        with torch.enable_grad():
            outputs = [x for x in tree_leaves(module.train()(*inputs)) if isinstance(x, Tensor) and x.requires_grad]
            torch.stack([x.sum() for x in outputs]).sum().backward()
        capture.take([p for p in module.parameters() if p.requires_grad])
    finally:
        capture.remove()
        module.train(training)
    return capture.plan
