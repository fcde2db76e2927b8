"""The latent cache: what a frozen encoder says of every training record, computed once for all of stage 2, and the
loss that stage 2 makes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..runs.checkpoint import write_atomic, write_json
from .data import ImageData, to_unit
from .loop import RecordLosses
from .losses import negative_iwae, reconstruction
from .models import ModelSpec

_ROWS = 1024


class LatentCache:
    """Posterior means and log-variances of the training records: ``values`` float32 ``[N, 2, latent_dim]``.

    In memory, or memory-mapped from a file of the curator's. It is as confidential as the records.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def build(cls, encoder: nn.Module, data: ImageData, device: torch.device) -> LatentCache:
        """Run the encoder over all records and keep the result in memory."""
        return cls(torch.from_numpy(np.concatenate(list(_encoded(encoder, data, device)))))

    @classmethod
    def open(cls, path: Path, encoder: nn.Module, data: ImageData, device: torch.device) -> LatentCache:
        """The cache at ``path``, memory-mapped; built first unless the one there is of this encoder and these records.

        A file is trusted only if it has the digest that its description (``path`` with ``.json`` appended) states: a
        damaged or unfinished one is built anew.
        """
        identity = {"data_sha256": data.sha256, "encoder_sha256": _digest_of_module(encoder)}
        description = path.with_name(path.name + ".json")
        if not _is_intact(path, description, identity):
            description.unlink(missing_ok=True)
            write_atomic(path, lambda file: _write(file, encoder, data, device))
            write_json(description, identity | {"sha256": _digest_of_file(path)})
        values = np.memmap(path, dtype=np.float32, mode="c")  # copy-on-write: the file stays as it is
        return cls(torch.from_numpy(values).reshape(len(data), 2, -1))

    def posterior(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the records at ``indices [B]``, each ``[B, latent_dim]``."""
        mean, log_variance = self.values[indices].unbind(1)
        return mean, log_variance


def decoder_losses(
    data: ImageData, latents: LatentCache, noise: torch.Generator, spec: ModelSpec, model: ModelConfig
) -> RecordLosses:
    """Stage 2's loss of each record: ``iwae_samples`` latents from its cached posterior, by ``noise`` drawn by place in
    the batch, and what the decoder then misses of the image."""
    samples = model.iwae_samples

    def fetch(indices: Tensor) -> tuple[Tensor, ...]:
        images, labels = data.rows(indices)
        mean, log_variance = latents.posterior(indices)
        normal = torch.randn(len(indices) * samples, mean.shape[1], generator=noise)
        return images, mean, log_variance, normal, *(() if labels is None or not spec.num_classes else (labels,))

    def compute(
        module: nn.Module,
        images: Tensor,
        mean: Tensor,
        log_variance: Tensor,
        normal: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        shape = (len(images), samples)
        mean, log_variance = mean.repeat_interleave(samples, 0), log_variance.repeat_interleave(samples, 0)
        z = mean + (0.5 * log_variance).exp() * normal
        labels = None if labels is None else labels.repeat_interleave(samples, 0)
        images = to_unit(images).repeat_interleave(samples, 0)
        missed = reconstruction(module(z, labels), images, spec.likelihood)
        if samples == 1:
            return missed
        posterior = (mean.unflatten(0, shape)[:, 0], log_variance.unflatten(0, shape)[:, 0])
        return negative_iwae(missed.reshape(shape), z.unflatten(0, shape), *posterior, beta=model.beta)

    return RecordLosses(fetch, compute)


@torch.no_grad()
def _encoded(encoder: nn.Module, data: ImageData, device: torch.device) -> Iterator[np.ndarray]:
    """Posteriors of consecutive records, float32 ``[n, 2, latent_dim]``."""
    encoder.eval()
    for start in range(0, len(data), _ROWS):
        images = to_unit(data.images[start : start + _ROWS].to(device))
        labels = None if data.labels is None else data.labels[start : start + _ROWS].to(device)
        yield torch.stack(encoder(images, labels), 1).float().cpu().numpy()


def _write(file: BinaryIO, encoder: nn.Module, data: ImageData, device: torch.device) -> None:
    for rows in _encoded(encoder, data, device):
        file.write(rows.tobytes())


def _is_intact(path: Path, description: Path, identity: dict[str, str]) -> bool:
    try:
        return json.loads(description.read_text()) == identity | {"sha256": _digest_of_file(path)}
    except (OSError, ValueError):
        return False


def _digest_of_module(module: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.detach().cpu().numpy().tobytes())
    return sha.hexdigest()


def _digest_of_file(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
