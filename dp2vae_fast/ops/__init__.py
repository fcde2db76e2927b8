"""The computations of differentially private training, as plain functions of tensors.

Each op is declared once (see `dp2vae_fast.ops._op`) and runs on C++, CUDA, Triton or plain PyTorch.
Ops know nothing of modules, optimizers or privacy accounting, and may be used alone by any other trainer.
"""

import torch

from dp2vae_fast.ops._op import backend, backends_table, load_triton
from dp2vae_fast.ops.affine import group_norm_grad_sample, layer_norm_grad_sample
from dp2vae_fast.ops.clip import clip_factors, normalize_factors
from dp2vae_fast.ops.gradient import (
    conv_direct_norm_sq,
    conv_kept,
    conv_weight_gradient,
    conv_weighted_sum,
    kept_weighted_sum,
    linear_direct_norm_sq,
    linear_kept,
    linear_weighted_sum,
    masked,
    outer_weighted_sum,
    result_dtype,
)
from dp2vae_fast.ops.layout import lying, memory_order
from dp2vae_fast.ops.machine import instruction_set, native_kernels, processor
from dp2vae_fast.ops.noise import add_noise_, noise_adam_, noise_sgd_, random_words
from dp2vae_fast.ops.norm import (
    conv_norm_sq,
    embedding_norm_sq,
    grad_sample_norm_sq,
    linear_norm_sq,
    per_dim,
    widen,
)

__all__ = [
    "add_noise_",
    "backend",
    "backends_table",
    "clip_factors",
    "conv_direct_norm_sq",
    "conv_kept",
    "conv_norm_sq",
    "conv_weight_gradient",
    "conv_weighted_sum",
    "embedding_norm_sq",
    "grad_sample_norm_sq",
    "group_norm_grad_sample",
    "instruction_set",
    "kept_weighted_sum",
    "layer_norm_grad_sample",
    "linear_direct_norm_sq",
    "linear_kept",
    "linear_norm_sq",
    "linear_weighted_sum",
    "lying",
    "masked",
    "memory_order",
    "native_kernels",
    "noise_adam_",
    "noise_sgd_",
    "normalize_factors",
    "outer_weighted_sum",
    "per_dim",
    "processor",
    "random_words",
    "result_dtype",
    "widen",
]

if torch.version.cuda is not None:
    load_triton()
