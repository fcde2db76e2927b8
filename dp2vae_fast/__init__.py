"""Fast differentially private training of variational autoencoders."""

from dp2vae_fast.ops import backend, backends_table

__all__ = ["backend", "backends_table"]
__version__ = "0.1.0"
