"""The computations of differentially private training, as plain functions of tensors.

Each op is declared once (see `dp2vae_fast.ops._op`) and runs on C++, CUDA, Triton or plain PyTorch. Ops know nothing of
modules, optimizers or privacy accounting, and may be used alone by any other trainer.
"""

import torch

from dp2vae_fast.ops._op import backend, backends_table, load_triton

__all__ = ["backend", "backends_table"]

if torch.version.cuda is not None:
    load_triton()
