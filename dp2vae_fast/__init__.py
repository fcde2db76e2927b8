"""Fast differentially private training of variational autoencoders."""

import importlib
from typing import TYPE_CHECKING

from .engine.captured import CapturedBatches
from .engine.gradients.layers import register_layer_rule
from .engine.gradients.plan import Plan
from .engine.keystream import Keystream
from .engine.opacus_samplers import register_with_opacus
from .engine.privacy_engine import PrivacyEngine
from .ops import backend, backends_table

if TYPE_CHECKING:
    from .config import Config
    from .engine.audit import audit_engine
    from .trainer import Trainer
    from .vae.data import make_image_data
    from .vae.release import load_decoder

__all__ = [
    "CapturedBatches",
    "Config",
    "Keystream",
    "Plan",
    "PrivacyEngine",
    "Trainer",
    "audit_engine",
    "backend",
    "backends_table",
    "load_decoder",
    "make_image_data",
    "register_layer_rule",
    "register_with_opacus",
]
__version__ = "0.1.0"

_LATER = {
    "Config": "config",
    "Trainer": "trainer",
    "audit_engine": "engine.audit",
    "load_decoder": "vae.release",
    "make_image_data": "vae.data",
}


def __getattr__(name: str):
    """Imported on first use: the audit takes a while, and the doors of the system need the ``[train]`` extra."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f'{name} needs {error.name}: pip install "dp2vae_fast[train]"') from error
