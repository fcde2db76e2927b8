"""Fast differentially private training of variational autoencoders."""

import importlib
from typing import TYPE_CHECKING

from .engine.layers import register_layer_rule
from .engine.opacus_samplers import register_with_opacus
from .engine.privacy_engine import PrivacyEngine
from .ops import backend, backends_table

if TYPE_CHECKING:
    from .trainer import Trainer
    from .vae.release import load_decoder

__all__ = [
    "PrivacyEngine",
    "Trainer",
    "backend",
    "backends_table",
    "load_decoder",
    "register_layer_rule",
    "register_with_opacus",
]
__version__ = "0.1.0"

_TRAIN = {"Trainer": "trainer", "load_decoder": "vae.release"}


def __getattr__(name: str):
    """The doors of the system, imported on first use: they need the ``[train]`` extra, the engine does not."""
    if name not in _TRAIN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_TRAIN[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f'{name} needs {error.name}: pip install "dp2vae_fast[train]"') from error
