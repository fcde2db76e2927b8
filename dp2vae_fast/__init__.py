"""Fast differentially private training of variational autoencoders."""

from .engine.layers import register_layer_rule
from .engine.privacy_engine import PrivacyEngine
from .ops import backend, backends_table

__all__ = ["PrivacyEngine", "backend", "backends_table", "register_layer_rule"]
__version__ = "0.1.0"
