"""Two ranks are one process with their records together: the same sums, one noise, one count."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loops import privatize
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dp2vae_fast import PrivacyEngine
from dp2vae_fast.engine import keystream as keystream_module
from dp2vae_fast.engine.distributed import DistributedDPOptimizer, Ranks
from dp2vae_fast.engine.keystream import Keystream
from dp2vae_fast.engine.optimizer import DPOptimizer

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.utils.batch_memory_manager import BatchMemoryManager
from ranks import SIZE, Pair

N, Q = 40, 1 / 5
DRAWS = [[0, 1, 2, 5, 8, 9, 30], [3, 4, 6, 8, 10, 12], [2, 4, 38], [7, 9], [], [0, 7, 11, 12, 24, 39]]
"""Union of the ranks' draws; rank r has the records r, r + 2, ...: none of rank 1 in the third, none of rank 0 next."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[Pair]:
    pair = Pair(str(tmp_path_factory.mktemp("ranks") / "store"))
    yield pair
    pair.close()


def small_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(7)
    layers = nn.Linear(6, 18), nn.Unflatten(1, (2, 3, 3)), nn.GroupNorm(1, 2), nn.Conv2d(2, 3, 2), nn.Flatten()
    return nn.Sequential(*layers).to(dtype)


def records(dtype: torch.dtype = torch.float64, n: int = N) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def data(dtype: torch.dtype = torch.float64, n: int = N, batch_size: int = 8, **kwargs) -> DataLoader:
    return DataLoader(TensorDataset(records(dtype, n)), batch_size=batch_size, **kwargs)


def private(rank: int | None, model: nn.Module, *, engine: PrivacyEngine | None = None, **settings) -> Any:
    """What make_private returns; in one process where ``rank`` is None."""
    if rank is not None:
        model = DPDDP(model)
    make = settings.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.5))
    loader = settings.pop("data_loader", None) or data(next(model.parameters()).dtype)
    common: dict[str, Any] = dict(noise_multiplier=0.0, max_grad_norm=0.3) | settings
    engine = engine or PrivacyEngine(accountant="rdp")
    parts = engine.make_private(module=model, optimizer=make(model.parameters()), data_loader=loader, **common)
    if isinstance(parts[1], DPOptimizer):
        parts[1].pending.one_draw_at_a_time = False  # some tests step on batches of their own
    return parts


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def backward(model: nn.Module, batch: Tensor, reduction: str = "mean") -> None:
    if len(batch):
        loss = model(batch).square().sum(1)
        (loss.mean() if reduction == "mean" else loss.sum()).backward()


# The same as one process ----------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "flat": {},
    "sum": {"loss_reduction": "sum"},
    "adam": {"optimizer": torch.optim.Adam},
    "gradient in memory": {"optimizer": torch.optim.Adam, "materialize_grad": True},
    "optimizer without a fused update": {"optimizer": torch.optim.RMSprop},
    "per layer": {"clipping": "per_layer"},
    "automatic": {"clipping": "automatic"},
    "adaptive": {"clipping": "adaptive", "unclipped_num_std": 1e-13},
}


def train_on_fixed_draws(rank: int | None, mode: str) -> tuple[list[Tensor], float]:
    model, optimizer, _ = private(rank, small_model(), **MODES[mode])
    x, reduction = records(), MODES[mode].get("loss_reduction", "mean")
    for draw in DRAWS:
        own = torch.tensor([i for i in draw if rank is None or i % SIZE == rank], dtype=torch.int64)
        physical = own.tensor_split(2) if rank == 0 else [own]  # rank 0 has two physical batches, the others one
        for i, part in enumerate(physical):
            optimizer.signal_skip_step(do_skip=i + 1 < len(physical))
            backward(model, x[part], reduction)
            optimizer.step()
            optimizer.zero_grad()
    return parameters(model), optimizer.max_grad_norm


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_take_the_steps_of_one_process(pair: Pair, mode: str):
    alone, bound = train_on_fixed_draws(None, mode)
    (one, one_bound), (other, other_bound) = pair(train_on_fixed_draws, mode)
    assert equal(one, other) and one_bound == other_bound == pytest.approx(bound, abs=1e-9)
    for found, expected in zip(one, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert not equal(one, parameters(small_model()))


def accumulate_two_batches(rank: int | None) -> list[Tensor]:
    """Rank 1 has no record in the second of them, and no backward."""
    sampler = None if rank is None else DistributedSampler(records(), SIZE, rank, drop_last=True)
    loader = data(batch_size=8 if rank is None else 4, sampler=sampler)
    model, optimizer, _ = private(rank, small_model(), data_loader=loader, poisson_sampling=False)
    assert optimizer.expected_batch_size == 8
    for draw in ([0, 1, 2, 5], [6, 8]):
        backward(model, records()[[i for i in draw if rank is None or i % SIZE == rank]])
    optimizer.step()
    return parameters(model)


def test_accumulated_batches_are_divided_alike_on_every_rank(pair: Pair):
    alone, (one, other) = accumulate_two_batches(None), pair(accumulate_two_batches)
    assert equal(one, other)
    for found, expected in zip(one, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# Noise ----------------------------------------------------------------------------------------------------------


def take_noise(rank: int, materialize: bool, seed: int | None) -> list[Tensor]:
    """Two empty steps of plain noise; only the ranks' own keys could differ."""
    model = nn.Linear(300, 200)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    generator = None if seed is None else torch.Generator().manual_seed(seed + rank)
    _, optimizer, _ = private(
        rank,
        model,
        data_loader=DataLoader(TensorDataset(torch.zeros(N, 300)), batch_size=8),
        noise_multiplier=2.0,
        loss_reduction="sum",
        noise_generator=generator,
        materialize_grad=materialize,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )
    assert isinstance(optimizer, DistributedDPOptimizer) and (optimizer.rank, optimizer.world_size) == (rank, SIZE)
    assert optimizer.stream.source == ("secret" if seed is None else "seeded")
    steps = [parameters(model)]
    for _ in range(2):
        optimizer.step()
        steps.append(parameters(model))
    (a, *_), (b, *_), (c, *_) = steps
    return [b - a, c - b]


@pytest.mark.parametrize("materialize", [False, True])
def test_noise_is_added_once_and_is_the_same_on_all_ranks(pair: Pair, materialize: bool):
    one, other = pair(take_noise, materialize, None)
    assert equal(one, other)
    assert abs(float(torch.corrcoef(torch.stack([x.flatten() for x in one]))[0, 1])) < 0.02
    for noise in one:  # 60,000 elements: four standard errors are 1.2 %
        assert float(noise.std()) == pytest.approx(2.0 * 0.3, rel=0.012)
    again, _ = pair(take_noise, materialize, None)
    assert not equal(one, again)


def test_seeded_noise_follows_from_the_first_ranks_generator(pair: Pair):
    one, other = pair(take_noise, False, 5)
    again, _ = pair(take_noise, False, 5)
    assert equal(one, other) and equal(one, again)


def log_of_draws(rank: int, seed: int | None) -> tuple[set, set]:
    """(key, mechanism, domain, step, index) of every coin and of all noise, over two models of one engine."""
    coins, noise, real = set(), set(), keystream_module.noise

    class Logged:
        COINS, NOISE = real.COINS, real.NOISE

        @staticmethod
        def random_words(key, step, mechanism, domain, index, n):
            if domain == real.COINS:
                coins.add((bytes(key.numpy()), mechanism, domain, int(step), index))
            return real.random_words(key, step, mechanism, domain, index, n)

        @staticmethod
        def add_noise_(tensors, key, step, mechanism, indices, std):
            noise.update((bytes(key.numpy()), mechanism, real.NOISE, int(step), index) for index in indices)
            real.add_noise_(tensors, key, step, mechanism, indices, std)

    keystream_module.noise = Logged  # type: ignore[assignment]
    try:
        engine = PrivacyEngine(keystream=None if seed is None else Keystream.seeded(seed))
        for _ in range(2):
            _, optimizer, loader = private(
                rank, small_model(), engine=engine, noise_multiplier=1.0, materialize_grad=True, clipping="adaptive"
            )
            for _ in loader:
                optimizer.step()
    finally:
        keystream_module.noise = real
    return coins, noise


@pytest.mark.parametrize("seed", [None, 3])
def test_no_block_is_drawn_twice(pair: Pair, seed: int | None):
    (coins, noise), (other_coins, other_noise) = pair(log_of_draws, seed)
    assert len(coins) == len(other_coins) == 2 * 5 and not coins & other_coins
    tensors = len(parameters(small_model())) + 1  # and the count of adaptive clipping
    assert noise == other_noise and len(noise) == 2 * 5 * tensors


# Sampling -------------------------------------------------------------------------------------------------------


def draws_of_a_rank(rank: int, n: int, batch_size: int, passes: int, how: str) -> tuple[list[list[int]], float, int]:
    sampler = DistributedSampler(records(n=n), SIZE, rank) if how == "DistributedSampler" else None
    loader = data(n=n, batch_size=batch_size // SIZE if sampler else batch_size, sampler=sampler)
    options = {"dataset_size": n} if how == "declared" else {}
    engine = PrivacyEngine(keystream=Keystream.seeded(1))
    _, optimizer, loader = private(rank, small_model(), engine=engine, data_loader=loader, **options)
    assert optimizer.expected_batch_size == batch_size
    return [draw for _ in range(passes) for draw in loader.batch_sampler], loader.sample_rate, len(loader)


@pytest.mark.parametrize("how", ["plain", "DistributedSampler", "declared"])
def test_the_union_of_the_ranks_draws_is_one_poisson_draw(pair: Pair, how: str):
    n, batch, passes = 400, 40, 30
    (one, rate, steps), (other, *same) = pair(draws_of_a_rank, n, batch, passes, how)
    assert [rate, steps] == same == [0.1, 10] and len(one) == len(other) == passes * steps
    assert all(i % SIZE == 0 for draw in one for i in draw) and all(i % SIZE == 1 for draw in other for i in draw)
    assert all(draw == sorted(set(draw)) for draw in one + other)
    assert all(set(i // SIZE for i in a) != set(i // SIZE for i in b) for a, b in zip(one, other, strict=True))
    sizes = torch.tensor([len(a) + len(b) for a, b in zip(one, other, strict=True)], dtype=torch.float64)
    draws, variance = len(sizes), n * rate * (1 - rate)
    assert abs(float(sizes.mean()) - n * rate) < 4 * math.sqrt(variance / draws)
    assert abs(float(sizes.var()) / variance - 1) < 4 * math.sqrt(2 / draws)
    counts = torch.bincount(torch.tensor([i for draw in one + other for i in draw]), minlength=n)
    assert counts.shape == (n,) and float((counts - draws * rate).abs().max()) < 5 * math.sqrt(draws * rate * 0.9)


def test_empty_draws_stay_and_ranks_without_a_record_draw_too(pair: Pair):
    (one, *_), (other, _, steps) = pair(draws_of_a_rank, 6, 1, 4, "plain")
    assert len(one) == len(other) == 4 * steps == 24 and [] in one and [] in other
    (one, *_), (other, *_) = pair(draws_of_a_rank, 1, 1, 3, "plain")
    assert one == [[0]] * 3 and other == [[]] * 3


# A user's loop --------------------------------------------------------------------------------------------------


def whole_loop(rank: int, how: str) -> tuple[list[Tensor], list, float, int]:
    engine = PrivacyEngine(accountant="rdp")
    options = {"physical_batch_size": 2} if how == "padded" else {}
    model, optimizer, loader = private(
        rank, small_model(torch.float32), engine=engine, noise_multiplier=1.0, clipping="adaptive", **options
    )
    batches = 0

    def loop(loader: DataLoader) -> None:
        nonlocal batches
        for (batch,) in loader:
            batches += 1
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()

    for _ in range(2):
        if how == "memory manager":
            with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as small:
                loop(small)
        else:
            loop(loader)
    return parameters(model), engine.accountant.history, optimizer.max_grad_norm, batches


@pytest.mark.parametrize("how", ["plain", "memory manager", "padded"])
def test_every_rank_steps_and_counts_alike(pair: Pair, how: str):
    (one, history, bound, batches), (other, other_history, other_bound, other_batches) = pair(whole_loop, how)
    assert equal(one, other) and bound == other_bound != 0.3
    assert history == other_history == [(1.0, 1 / 5, 10)]
    assert min(batches, other_batches) >= 10 if how == "plain" else min(batches, other_batches) > 10


def own_loop(rank: int) -> tuple[list[Tensor], list]:
    engine = PrivacyEngine(accountant="rdp")
    model = DPDDP(small_model())
    model, optimizer = privatize(model, engine=engine, noise_multiplier=1.0, expected_batch_size=4)
    for _ in range(2):
        backward(model, records()[rank::SIZE], "sum")
        optimizer.step()
    return parameters(model), engine.accountant.history


def test_a_loop_that_draws_its_own_batches(pair: Pair):
    (one, history), (other, _) = pair(own_loop)
    assert equal(one, other) and history == [(1.0, 0.1, 2)]


def target(rank: int) -> tuple[float, int]:
    model = DPDDP(small_model())
    engine = PrivacyEngine(accountant="rdp")
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data(batch_size=4, sampler=DistributedSampler(records(), SIZE, rank)),
        target_epsilon=4.0,
        target_delta=1e-5,
        epochs=1,
        max_grad_norm=1.0,
        dataset_size=N,
    )
    for _ in loader:
        optimizer.step()
    return engine.get_epsilon(1e-5), optimizer.expected_batch_size


def test_a_target_is_met_by_all_ranks_together(pair: Pair):
    (epsilon, expected), other = pair(target)
    assert (epsilon, expected) == other and 3.0 < epsilon <= 4.0 and expected == 8


# The bound ------------------------------------------------------------------------------------------------------


def total_without(rank: int, left_out: int | None, size: float) -> tuple[list[Tensor], float]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 40))
    model, optimizer, _ = private(rank, model, data_loader=data(torch.float32), loss_reduction="sum")
    own = [i for i in range(rank, N, SIZE) if i != left_out]
    batch = records(torch.float32)[own]
    (model(batch).square().sum(1) * torch.tensor([size if i < 4 else 1.0 for i in own])).sum().backward()
    assert optimizer._begin_step()
    return [total.double() for total in optimizer._pending_sums()], optimizer.sensitivity()


@pytest.mark.parametrize("size", [1.0, 1e6, 1e-4])
@pytest.mark.parametrize("left_out", [0, 3])
def test_one_record_of_one_rank_moves_the_total_by_at_most_the_sensitivity(pair: Pair, left_out: int, size: float):
    (with_all, bound), (same, _) = pair(total_without, None, size)
    (without, _), _ = pair(total_without, left_out, size)
    assert equal(with_all, same)
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(with_all, without, strict=True)))
    assert 0 < moved <= bound < 0.3 * 1.02
    assert size < 1 or moved > 0.3 * 0.99


def lower_the_bound_between(rank: int) -> tuple[float, float]:
    """Rank 0 clips a first physical batch to 0.3 before a schedule lowers the bound; rank 1 has only the second."""
    model, optimizer, _ = private(rank, small_model(), noise_multiplier=1.0)
    if rank == 0:
        optimizer.signal_skip_step(do_skip=True)
        backward(model, 100 * records()[:4])
        optimizer.step()
    optimizer.max_grad_norm = 0.1
    backward(model, records()[4:8])
    assert optimizer._begin_step()
    return optimizer._noise_std(), optimizer.max_grad_norm


def test_the_noise_is_for_the_largest_bound_of_any_rank(pair: Pair):
    one, other = pair(lower_the_bound_between)
    assert one == other and one[0] >= 0.3 and one[1] == 0.1


# What is refused ------------------------------------------------------------------------------------------------


def refused(rank: int, name: str) -> str:
    try:
        REFUSED[name](rank)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def frozen(rank: int) -> nn.Module:
    model = small_model()
    model[0].bias.requires_grad_(rank == 0)
    return model


def shares(rank: int, n: int = N, **kwargs) -> DataLoader:
    return data(n=n, sampler=DistributedSampler(records(n=n), SIZE, rank, **kwargs))


def wrap(rank: int, wrapper: Callable[[nn.Module], nn.Module]) -> None:
    private(None, wrapper(small_model(torch.float32)))


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (SIZE,)))


def set_apart(rank: int, **settings: Any) -> None:
    _, optimizer, _ = private(rank, small_model())
    for name, values in settings.items():
        setattr(optimizer, name, values[rank])
    optimizer.step()


def freeze_one(rank: int) -> None:
    """Parameters of equal size, one of which each rank trains."""
    model, optimizer, _ = private(rank, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double())
    list(model.parameters())[2 * rank].requires_grad_(False)
    optimizer.step()


def fail_after_the_sum(rank: int) -> int:
    model, optimizer, _ = private(rank, small_model())

    def fail(_: Any) -> None:
        raise KeyError("the budget is spent")

    optimizer.attach_step_hook(fail)
    backward(model, records()[rank::SIZE])
    with pytest.raises(KeyError):
        optimizer.step()
    return len(optimizer._sums)


REFUSED: dict[str, Callable[[int], Any]] = {
    "different noise_multiplier": lambda r: private(r, small_model(), noise_multiplier=1.0 + r),
    "different max_grad_norm": lambda r: private(r, small_model(), max_grad_norm=[0.3, -1.0][r]),
    "different clipping": lambda r: private(r, small_model(), clipping=["flat", "automatic"][r]),
    "different numbers of trainable parameters": lambda r: private(r, frozen(r)),
    "different optimizers": lambda r: private(
        r, small_model(), optimizer=[torch.optim.RMSprop, torch.optim.Adagrad][r]
    ),
    "different numbers of records": lambda r: private(r, small_model(), data_loader=data(n=N + r, batch_size=8)),
    "different dataset_size": lambda r: private(r, small_model(), dataset_size=N + r),
    "different poisson_sampling": lambda r: private(
        r, small_model(), data_loader=shares(r, drop_last=True), poisson_sampling=r == 0
    ),
    "different sources of noise": lambda r: private(
        r, small_model(), engine=PrivacyEngine(keystream=[Keystream.secret(), Keystream.seeded(1)][r])
    ),
    "different orders of records": lambda r: private(
        r, small_model(), data_loader=shares(r, drop_last=True, seed=r), poisson_sampling=False
    ),
    "DistributedSampler with drop_last": lambda r: private(r, small_model(), poisson_sampling=False),
    "could reach several ranks": lambda r: private(r, small_model(), data_loader=shares(0), poisson_sampling=False),
    "or one rank twice": lambda r: private(r, small_model(), data_loader=shares(r, n=N + 1), poisson_sampling=False),
    "DistributedDataParallel averages": lambda r: wrap(r, nn.parallel.DistributedDataParallel),
    "sharded parameters": lambda r: wrap(r, fsdp),
    "is inside the module": lambda r: wrap(r, lambda model: nn.Sequential(DPDDP(model))),
    "at different noise_multipliers": lambda r: set_apart(r, noise_multiplier=[1.0, 2.0]),
    "at different bounds": lambda r: set_apart(r, max_grad_norm=[0.3, 0.2]),
    "at different expected_batch_sizes": lambda r: set_apart(r, expected_batch_size=[4, 5]),
    "at different set of trainable parameters": lambda r: freeze_one(r),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_on_every_rank(pair: Pair, name: str):
    for message in pair(refused, name):
        assert re.search(name, message), message


def test_a_step_that_fails_after_the_sum_leaves_none_behind(pair: Pair):
    assert pair(fail_after_the_sum) == [0, 0]


def opacus_own_mode(rank: int) -> str:
    _, optimizer, _ = private(rank, small_model(), grad_sample_mode="hooks")
    return type(optimizer).__module__


def test_opacus_own_modes_are_passed_through(pair: Pair):
    assert pair(opacus_own_mode) == ["opacus.optimizers.ddpoptimizer"] * SIZE


def test_ranks_without_a_process_group_are_refused():
    with pytest.raises(RuntimeError, match="init_process_group"):
        Ranks(torch.zeros(1))


def test_one_ranks_loader_is_refused_in_one_process():
    with pytest.raises(ValueError, match="does not give all"):
        private(None, small_model(), data_loader=data(sampler=DistributedSampler(records(), SIZE, 0)))


# Checkpoints ----------------------------------------------------------------------------------------------------


def saved(rank: int) -> tuple[list[str], bytes, list[Tensor]]:
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = private(
        rank, small_model(), engine=engine, noise_multiplier=1.0, optimizer=torch.optim.Adam
    )
    for (batch,) in loader:
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    file = io.BytesIO()
    engine.save_checkpoint(path=file, module=model, optimizer=optimizer)
    return list(model.state_dict()), file.getvalue(), parameters(model)


def resumed(rank: int, content: bytes) -> tuple[list[Tensor], list[Tensor], list]:
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = private(
        rank, small_model(), engine=engine, noise_multiplier=1.0, optimizer=torch.optim.Adam
    )
    engine.load_checkpoint(path=io.BytesIO(content), module=model, optimizer=optimizer)
    before = parameters(model)
    for (batch,) in loader:
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    return before, parameters(model), engine.accountant.history


def test_a_checkpoint_of_one_rank_resumes_all(pair: Pair):
    (names, content, kept), _ = pair(saved)
    assert all(name.startswith("_module.module.") for name in names)  # as Opacus names them
    (one, one_after, history), (other, other_after, other_history) = pair(resumed, content)
    assert equal(one, kept) and equal(other, kept)
    assert equal(one_after, other_after) and not equal(one, one_after)
    assert history == other_history == [(1.0, 1 / 5, 10)]
