"""One model trained by several processes (``torch.distributed``), each on its own part of the records.

Every rank draws from its own records and clips them by itself. Once a step the clipped sums of all ranks are added up,
in float64, and every rank adds the *same* noise to the total and takes the same step: noise is added once, whatever
the number of ranks. For this the ranks share a key, which goes through the process group and nowhere else.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler

from .keystream import Keystream, Stream
from .optimizer import DPOptimizer

_SHARDED = (FSDPModule, FullyShardedDataParallel)


class Ranks:
    """The processes of the default process group, each of which makes the same calls in the same order.

    Args:
        like: a tensor on the device that the process group takes tensors from.

    Attributes:
        rank, size: this process and the number of processes.
    """

    def __init__(self, like: Tensor) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("there is no process group: call torch.distributed.init_process_group first")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = like.device

    @classmethod
    def of(cls, module: nn.Module) -> Ranks | None:
        """Those that train ``module``; None where it is not wrapped in Opacus' ``DPDDP``.

        Raises:
            NotImplementedError: another wrapper, or this one further inside.
        """
        if isinstance(module, AbstractGradSampleModule):
            module = module._module
        for inner in module.modules():
            if isinstance(inner, DistributedDataParallel):
                raise NotImplementedError(
                    "DistributedDataParallel averages gradients that are neither clipped nor noised: wrap the model in "
                    "opacus.distributed.DifferentiallyPrivateDistributedDataParallel instead"
                )
            if isinstance(inner, _SHARDED):
                raise NotImplementedError(
                    "fused mode does not take sharded parameters (FSDP): wrap the model in "
                    "opacus.distributed.DifferentiallyPrivateDistributedDataParallel instead"
                )
            if isinstance(inner, DPDDP) and inner is not module:
                raise NotImplementedError(
                    "DifferentiallyPrivateDistributedDataParallel is inside the module, whose other parts the ranks "
                    "would train apart: wrap the whole module in it"
                )
        return cls(next(module.parameters())) if isinstance(module, DPDDP) else None

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives as ``value``, a small object, in the order of ranks."""
        every: list[Any] = [None] * self.size
        with torch.cuda.device_of(torch.empty(0, device=self._device)):
            dist.all_gather_object(every, value)
        return every

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Compare ``settings`` with those of the other ranks.

        Raises:
            ValueError: on every rank, where any two differ.
        """
        every = self.gather({name: repr(value) for name, value in settings.items()})
        for name in {name: None for other in every for name in other}:
            values = [other.get(name, "nothing") for other in every]
            if len(set(values)) > 1:
                raise ValueError(f"the ranks have different {name}: {', '.join(values)} on ranks 0 to {self.size - 1}")

    def share(self, keystream: Keystream) -> Keystream:
        """A keystream that all ranks have in common, new at every call; its key follows from rank 0's ``keystream``.

        The others' takes a mechanism too, so that all ranks number theirs alike.
        """
        self.agree({"sources of noise": keystream.source})
        key = keystream.stream("key of all ranks").new_key().to(self._device)
        dist.broadcast(key, 0)
        return Keystream(key.cpu().numpy().tobytes(), keystream.source)

    def own_stream(self, shared: Keystream, name: str) -> Stream:
        """One stream for each rank, of which no two share a block: this rank's."""
        return [shared.stream(f"{name}, rank {rank}") for rank in range(self.size)][self.rank]

    def rows(self, row: Sequence[float]) -> list[list[float]]:
        """Every rank's ``row`` of numbers, in the order of ranks."""
        rows = torch.zeros(self.size, len(row), dtype=torch.float64)
        rows[self.rank] = torch.tensor(row, dtype=torch.float64)
        rows = rows.to(self._device)
        dist.all_reduce(rows)
        return rows.tolist()

    def add_up(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sums of ``parts`` over the ranks, in float64."""
        flat = torch.cat([x.to(self._device, torch.float64).flatten() for x in parts])
        dist.all_reduce(flat)
        sums = flat.split([x.numel() for x in parts])
        return [total.view(x.shape).to(x.device) for total, x in zip(sums, parts, strict=True)]

    def check_parameters(self, optimizer: Optimizer) -> None:
        """The ranks must have optimizers of one kind, over as many parameters.

        Raises:
            ValueError: on every rank, where they have not.
        """
        trainable = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        inner = optimizer.original_optimizer if isinstance(optimizer, OpacusDPOptimizer) else optimizer
        self.agree(
            {
                "optimizers": type(inner).__name__,
                "numbers of trainable parameters": len(trainable),
                "numbers of elements": sum(p.numel() for p in trainable),
            }
        )

    def check_loader(self, loader: DataLoader, *, poisson_sampling: bool, dataset_size: int | None = None) -> None:
        """The ranks must have the same data set, and no record may be given to two of them.

        Raises:
            ValueError: on every rank, where loaders differ; without Poisson sampling, where the loader has no
                ``DistributedSampler`` that gives each rank records of its own.
        """
        size = len(loader.dataset)  # type: ignore[arg-type]
        sampler, apart = loader.sampler, False
        if isinstance(sampler, DistributedSampler):
            apart = (sampler.num_replicas, sampler.rank) == (self.size, self.rank) and sampler.total_size <= size
        self.agree(
            {
                "numbers of records": size,
                "numbers of batches": len(loader),
                "batch sizes": loader.batch_size,
                "dataset_size": dataset_size,
                "poisson_sampling": poisson_sampling,
                "samplers": type(sampler).__name__,
                "orders of records": [getattr(sampler, key, None) for key in ("shuffle", "seed", "epoch")],
            }
        )
        if not poisson_sampling and not all(self.gather(apart)):
            raise ValueError(
                "without Poisson sampling one record could reach several ranks, or one rank twice, and count several "
                "times: give the data loader a DistributedSampler with drop_last=True"
            )


class DistributedDPOptimizer(DPOptimizer):
    """A :class:`~.optimizer.DPOptimizer` whose sum runs over the records of all ranks.

    ``expected_batch_size`` is that of all ranks together. Every rank calls :meth:`step` equally often, not counting
    steps that are skipped; one without a record, or without a backward pass, too. Parameters stay equal to the bit.

    Args:
        ranks: the processes. All have the same ``stream``, and the same other arguments.

    Attributes:
        rank, world_size: as in Opacus.
    """

    def __init__(self, *args: Any, ranks: Ranks, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks = ranks
        self.rank, self.world_size = ranks.rank, ranks.size

    def _sum_up(self) -> None:
        """Add up what the ranks have: sums, the clipping's count, and the largest bound that any of them clipped to.

        Raises:
            RuntimeError: on every rank, where a schedule, a frozen parameter or an interrupted step has set them apart.
        """
        every = [p for group in self.param_groups for p in group["params"]]
        trained = ",".join(f"{i}:{p.numel()}" for i, p in enumerate(every) if p.requires_grad)
        equal = {
            "step": self.stream.step,
            "noise_multiplier": self.noise_multiplier,
            "bound": self.max_grad_norm,
            "expected_batch_size": self._expected_records / self.accumulated_iterations,
            "set of trainable parameter": zlib.crc32(trained.encode()),
        }
        rows = self.ranks.rows([*equal.values(), self._bound, self._batches, self.clipping.count])
        *columns, bounds, batches, counts = zip(*rows, strict=True)
        for name, values in zip(equal, columns, strict=True):
            if len(set(values)) > 1:
                raise RuntimeError(f"the ranks are at different {name}s: {', '.join(map(str, values))}")
        zero = torch.zeros((), dtype=torch.float64)
        totals = self.ranks.add_up([self._sums.get(p, zero.to(p.device).expand_as(p)) for p in self.params])
        self._sums.update(zip(self.params, totals, strict=True))
        self._bound, self._batches, self.clipping.count = max(bounds), int(max(batches)), sum(counts)
