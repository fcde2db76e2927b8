"""One draw a step: whatever a loop skips, repeats, interrupts or fetches ahead, no record is in a sum twice, and steps
that share a draw are accounted as what they are."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from cases import record_loss
from loops import privatize
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp2vae_fast import PrivacyEngine
from dp2vae_fast.engine.keystream import Keystream

D = torch.float64
N = 24


def private(physical: int | None = 4, *, batch_size: int = 8, workers: int = 0, noise: float = 0.0, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(D)
    engine = PrivacyEngine(accountant="rdp", keystream=Keystream.seeded(1))  # draws of several records each
    parts = engine.make_private(
        module=model,
        optimizer=options.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=1.0),
        data_loader=DataLoader(
            TensorDataset(3 + torch.randn(N, 3, dtype=D)), batch_size=batch_size, num_workers=workers
        ),
        noise_multiplier=noise,
        max_grad_norm=1.0,
        loss_reduction="sum",
        physical_batch_size=physical,
        **options,
    )
    return engine, model, *parts


def backward(module: nn.Module, batch: Tensor) -> None:
    record_loss(module(batch)).sum().backward()


# Padded batches --------------------------------------------------------------------------------------


def test_a_batch_that_is_skipped_ends_the_loop():
    _, _, module, optimizer, loader = private()
    with pytest.raises(RuntimeError, match="no step on the batch before"):
        for number, (batch,) in enumerate(loader):
            if number == 1:
                continue
            backward(module, batch)
            optimizer.step()


def test_so_does_an_error_that_somebody_caught():
    _, _, module, _optimizer, loader = private()
    with pytest.raises(RuntimeError, match="no step on the batch before"):
        for (batch,) in loader:
            try:
                backward(module, batch[:, :2])
            except RuntimeError:
                continue


def test_a_step_alone_after_an_error_goes_on():
    engine, _, module, optimizer, loader = private(1)
    for number, (batch,) in enumerate(loader):
        if number % 3:
            backward(module, batch)
        optimizer.step()
        optimizer.zero_grad()
    assert number > len(loader) and engine.accountant.history == [(0.0, 8 / N, len(loader))]  # a draw is one step


def test_batches_fetched_ahead_are_refused_and_no_mask_is_used_twice():
    _, model, _module, _optimizer, loader = private()
    before = model.weight.detach().clone()
    batches = iter(loader)
    next(batches)
    with pytest.raises(RuntimeError, match="before the next is fetched"):
        next(batches)
    assert torch.equal(before, model.weight)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_another_one_replaced_is_over(workers: int):
    _, _, module, optimizer, loader = private(workers=workers)
    old = iter(loader)
    (batch,) = next(old)
    backward(module, batch)
    optimizer.step()
    new = iter(loader)
    (batch,) = next(new)
    with pytest.raises(RuntimeError, match="another pass"):
        next(old)
    backward(module, batch)
    optimizer.step()
    for (batch,) in new:
        assert batch.shape == (4, 3)
        backward(module, batch)
        optimizer.step()


# Two draws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("physical", [None, 64])
def test_two_draws_in_one_backward_pass_are_refused(physical):
    """Of the same size, so that nothing else tells them apart."""
    _, model, module, optimizer, loader = private(physical, batch_size=N)
    assert loader.sample_rate == 1.0
    before = model.weight.detach().clone()
    losses = []
    with pytest.raises((ValueError, RuntimeError), match=r"two Poisson draws|before the next is fetched"):
        for _ in range(2):
            (batch,) = next(iter(loader))
            losses.append(record_loss(module(batch)).sum())
        sum(losses).backward()
        optimizer.step()
    assert torch.equal(before, model.weight)


def two_loaders(data: str, workers: int = 0):
    engine, _, module, optimizer, loader = private(None, workers=workers, noise=2.0)
    other = loader.dataset if data == "one" else TensorDataset(3 + torch.randn(N, 3, dtype=D))
    module, optimizer, second = engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(other, batch_size=8, num_workers=workers),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
        loss_reduction="sum",
    )
    return module, optimizer, loader, second


@pytest.mark.filterwarnings("ignore:this PrivacyEngine has counted steps on another data set")
@pytest.mark.parametrize(("data", "workers"), [("one", 0), ("one", 1), ("two", 0)])
def test_batches_of_two_loaders_in_one_step_must_be_of_two_data_sets(data: str, workers: int):
    module, optimizer, *loaders = two_loaders(data, workers)
    batches = [iter(loader) for loader in loaders]
    (one,), (other,) = map(next, batches)
    assert len(one) and len(other)
    backward(module, torch.cat([one, other]))
    if data == "one":
        with pytest.raises(ValueError, match="two data loaders over one data set"):
            optimizer.step()
    else:
        optimizer.step()
        backward(module, torch.cat([one, other, other[:1]]))
        with pytest.raises(ValueError, match="would count several times"):
            optimizer.step()


def test_batches_of_two_loaders_may_take_turns():
    module, optimizer, *loaders = two_loaders("one")
    for batches in zip(*loaders, strict=True):
        for (batch,) in batches:
            backward(module, batch)
            optimizer.step()
            optimizer.zero_grad()


def test_a_batch_skipped_under_the_memory_manager_drops_its_draw():
    _, _, module, optimizer, loader = private(None)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as split:
        with pytest.raises(RuntimeError, match="had no step, or two"):
            for number, (batch,) in enumerate(split):
                if number == 1:
                    continue
                backward(module, batch)
                optimizer.step()
    assert not optimizer._sums


def test_a_physical_batch_stepped_on_twice_drops_its_draw():
    _, _, module, optimizer, loader = private(None, batch_size=N)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=10, optimizer=optimizer) as split:
        (batch,) = next(iter(split))
        backward(module, batch)
        optimizer.step()
        backward(module, batch)
        with pytest.raises((ValueError, RuntimeError), match=r"or two|count several times"):
            for _ in range(3):
                optimizer.step()
                backward(module, batch)
    assert not optimizer._sums


def test_augmentations_summed_by_hand_are_refused():
    _, _, module, optimizer, loader = private(None, batch_size=N)
    (batch,) = next(iter(loader))
    backward(module, batch)
    optimizer.signal_skip_step(do_skip=True)
    optimizer.step()
    backward(module, batch.flip(1))
    with pytest.raises(ValueError, match="count several times"):
        optimizer.step()
    assert not optimizer._sums


# Batches that are of no draw, or not of its records ---------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kept", ["list", "cycle"])
def test_batches_kept_beyond_their_pass_are_refused(kept: str, workers: int):
    """Each use would be counted as a draw of its own."""
    engine, _, module, optimizer, loader = private(None, noise=1.0, workers=workers)
    with pytest.raises(ValueError, match="of no draw in use"):
        for (batch,) in list(loader) if kept == "list" else itertools.cycle(loader):
            backward(module, batch)
            optimizer.step()
            optimizer.zero_grad()
    assert sum(steps for _, _, steps in engine.accountant.history) == (0 if kept == "list" else len(loader))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_the_loader_of_before_are_refused(workers: int):
    _, _, module, optimizer, loader = private(None, workers=workers)
    with pytest.raises(ValueError, match="of no draw in use"):
        for (batch,) in DataLoader(loader.dataset, batch_size=8, shuffle=True):
            backward(module, batch)
            optimizer.step()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_draw_in_parts_with_one_backward_pass_is_refused(workers: int):
    """Row i of each part would be taken for the same record."""
    _, model, module, optimizer, loader = private(None, batch_size=N, workers=workers)
    before = model.weight.detach().clone()
    (batch,) = next(iter(loader))
    record_loss(torch.cat([module(part) for part in batch.chunk(2)])).sum().backward()
    with pytest.raises(ValueError, match=f"{N // 2} gradients in a step on a draw of {N} records"):
        optimizer.step()
    assert torch.equal(before, model.weight) and not optimizer._sums


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", [False, True])
def test_rows_beside_the_records_are_refused(split: bool, workers: int):
    """Another view of each, or as many made-up rows, in one tensor: a record would count twice."""
    _, model, module, optimizer, loader = private(None, batch_size=N, workers=workers)
    before = model.weight.detach().clone()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=N, optimizer=optimizer) as whole:
        (batch,) = next(iter(whole if split else loader))
    backward(module, torch.cat([batch, batch.flip(1)]))
    with pytest.raises(ValueError, match=f"{2 * N} gradients in one step on a draw of {N} records"):
        optimizer.step()
    assert torch.equal(before, model.weight) and not optimizer._sums


def test_a_batch_of_another_optimizers_memory_manager_is_refused():
    """Its parts are no draws, and whose end they are nobody tells."""
    engine, _, module, first, loader = private(None, batch_size=N, workers=1)
    _, optimizer, _ = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(loader.dataset, batch_size=N, num_workers=1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        loss_reduction="sum",
    )
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=5, optimizer=first) as split:
        (batch,) = next(iter(split))
    backward(module, batch)
    with pytest.raises(ValueError, match="of no draw in use"):
        optimizer.step()


@pytest.mark.parametrize("classes", [5, N + 5])
def test_rows_that_are_no_records_are_refused(classes: int):
    """The private module embeds one prompt a class; records meet it in the loss only."""
    _, _, module, optimizer, loader = private(None, batch_size=N, verify_first_step=False)
    (batch,) = next(iter(loader))
    (batch[:, :2] @ module(torch.randn(classes, 3, dtype=D)).T).square().sum().backward()
    with pytest.raises(ValueError, match=f"{classes} gradients in .* step on a draw of {N} records"):
        optimizer.step()


# Steps that fail -------------------------------------------------------------------------------------


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("where", ["weighting", "updating"])
def test_a_step_that_fails_leaves_no_sum_behind(where: str, monkeypatch):
    _, model, module, optimizer, loader = private(None, batch_size=N)
    (batch,) = next(iter(loader))

    def fail(*args, **kwargs):
        raise Interrupted

    target = (optimizer.update, "step") if where == "updating" else (type(optimizer.clipping), "factors")
    backward(module, batch)
    with monkeypatch.context() as patched:
        patched.setattr(*target, fail)
        with pytest.raises(Interrupted):
            optimizer.step()
    assert not optimizer._sums and not optimizer.origins
    before = model.weight.detach().clone()
    optimizer.step()  # of nothing
    assert torch.equal(before, model.weight)


def test_a_hook_that_fails_leaves_no_sum_behind_and_takes_nobodys_place():
    engine, _, module, optimizer, loader = private(None, batch_size=N, noise=1.0)
    (batch,) = next(iter(loader))

    def fail(_) -> None:
        raise Interrupted

    optimizer.attach_step_hook(fail)
    backward(module, batch)
    with pytest.raises(Interrupted):
        optimizer.step()
    assert not optimizer._sums
    assert engine.accountant.history == [(1.0, 1.0, 1)]  # it was counted before


@pytest.mark.parametrize("materialize", [False, True])
def test_a_hook_changes_the_noise_of_the_next_step_only(materialize: bool):
    after = []
    for factor in (1.0, 0.1):
        engine, model, module, optimizer, loader = private(None, batch_size=N, noise=2.0, materialize_grad=materialize)
        optimizer.attach_step_hook(lambda o, factor=factor: setattr(o, "noise_multiplier", factor * o.noise_multiplier))
        (batch,) = next(iter(loader))
        backward(module, batch)
        optimizer.step()
        assert engine.accountant.history == [(2.0, 1.0, 1)] and optimizer.noise_multiplier == 2.0 * factor
        after.append(model.weight.detach().clone())
    assert torch.equal(*after)


def test_a_new_pass_forgets_what_was_accumulated_by_hand():
    _, _, module, optimizer, loader = private(None, batch_size=N)
    (batch,) = next(iter(loader))
    backward(module, batch)
    optimizer.clip_and_accumulate()
    next(iter(loader))
    assert not optimizer._sums


def test_a_frozen_parameter_keeps_its_value_whatever_gradient_it_has():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).to(D)
    model[0].weight.requires_grad_(False)
    inner = torch.optim.RMSprop(model.parameters(), lr=0.1)
    private, optimizer = privatize(model, inner, expected_batch_size=4)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.ones_like(before)
    backward(private, torch.randn(4, 3, dtype=D))
    optimizer.step()
    assert torch.equal(before, model[0].weight)


# Accounting ------------------------------------------------------------------------------------------


def test_steps_on_one_draw_are_accounted_as_one_mechanism():
    engine, _, module, optimizer, loader = private(None, noise=2.0)
    for (batch,) in loader:
        for _ in range(4):
            backward(module, batch)
            optimizer.step()
            optimizer.zero_grad()
    assert engine.accountant.history == [(pytest.approx(1.0), 1 / 3, 3)]


def test_two_optimizers_on_one_batch_are_accounted_as_one_mechanism():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).to(D)
    engine = PrivacyEngine(accountant="rdp")
    settings = dict(max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=4, loss_reduction="sum")
    module, first = engine.privatize(
        model, torch.optim.SGD(model[0].parameters(), lr=0.1), noise_multiplier=3.0, **settings
    )
    _, second = engine.privatize(
        module, torch.optim.SGD(model[1].parameters(), lr=0.1), noise_multiplier=4.0, **settings
    )
    for _ in range(5):
        backward(module, torch.randn(4, 3, dtype=D))
        first.step()
        second.step()
    assert engine.accountant.history == [(pytest.approx((3**-2 + 4**-2) ** -0.5), 0.1, 5)]


def two_models(engine: PrivacyEngine):
    torch.manual_seed(0)
    parts = []
    for z in (3.0, 4.0):
        model = nn.Linear(3, 2).to(D)
        parts.append(
            engine.make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=DataLoader(TensorDataset(torch.randn(N, 3, dtype=D)), batch_size=8),
                noise_multiplier=z,
                max_grad_norm=1.0,
            )
        )
    return parts


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 0), (1, 0)])
def test_two_models_on_one_loaders_draws_are_accounted_as_one_mechanism(order):
    engine = PrivacyEngine(accountant="rdp")
    parts = two_models(engine)
    for (batch,) in parts[0][2]:
        for which in order:
            module, optimizer, _ = parts[which]
            if len(batch):  # an empty draw may be left out
                backward(module, batch)
            optimizer.step()
            optimizer.zero_grad()
    joint = sum((3.0, 4.0)[which] ** -2 for which in order) ** -0.5
    assert engine.accountant.history == [(pytest.approx(joint), 1 / 3, 3)]


def test_two_models_on_draws_of_their_own_are_accounted_one_by_one():
    engine = PrivacyEngine(accountant="rdp")
    parts = two_models(engine)
    for (one,), (other,) in zip(parts[0][2], parts[1][2], strict=True):
        for (module, optimizer, _), batch in zip(parts, (one, other), strict=True):
            backward(module, batch)
            optimizer.step()
            optimizer.zero_grad()
    assert sorted(engine.accountant.history) == [(3.0, 1 / 3, 1)] * 3 + [(4.0, 1 / 3, 1)] * 3


@pytest.mark.parametrize(("times", "between"), [(3, 70), (150, 1)])
def test_a_draw_in_use_is_remembered_whatever_steps_are_taken_between(times: int, between: int):
    engine = PrivacyEngine(accountant="rdp")
    (module, optimizer, loader), (other, other_optimizer, other_loader) = two_models(engine)
    (kept,), fresh = next(iter(loader)), itertools.chain.from_iterable(itertools.repeat(other_loader))
    for _ in range(times):
        backward(module, kept)
        optimizer.step()
        for (batch,) in itertools.islice(fresh, between):
            backward(other, batch)
            other_optimizer.step()
    joint = pytest.approx(3.0 / times**0.5)
    assert [entry for entry in engine.accountant.history if entry[0] != 4.0] == [(joint, 1 / 3, 1)]
    assert sum(steps for *_, steps in engine.accountant.history) == 1 + times * between
    counter = engine._counter  # forgets what is over
    assert max(len(counter._steps), *(len(step.origins) for step in counter._steps.values())) <= 128 + 4


@pytest.mark.parametrize("optimizer_of", ["first", "second"])
@pytest.mark.parametrize("loader_of", ["first", "second"])
def test_a_module_of_two_engines_has_the_draws_of_both(optimizer_of: str, loader_of: str):
    """Each engine counts its own steps; neither may take several on one draw for draws of their own."""
    engine, _, module, optimizer, loader = private(None, noise=2.0)
    engines, optimizers, loaders = {"first": engine}, {"first": optimizer}, {"first": loader}
    engines["second"] = PrivacyEngine(accountant="rdp")
    _, optimizers["second"], loaders["second"] = engines["second"].make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(loader.dataset, batch_size=12),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
        loss_reduction="sum",
    )
    for (batch,) in loaders[loader_of]:
        for _ in range(4):
            if len(batch):
                backward(module, batch)
            optimizers[optimizer_of].step()
            optimizers[optimizer_of].zero_grad()
    draws, rate = {"first": (3, 1 / 3), "second": (2, 1 / 2)}[loader_of]
    rate = 1 / 2 if optimizer_of == "second" else rate  # an optimizer's own rate is the least that is counted
    assert engines[optimizer_of].accountant.history == [(pytest.approx(1.0), rate, draws)]


def test_an_engine_keeps_no_model_alive():
    engine = PrivacyEngine(accountant="rdp")
    models = []
    for _ in range(3):
        for module, optimizer, loader in two_models(engine):
            models.append(weakref.ref(module._module))
            backward(module, next(iter(loader))[0])
            optimizer.step()
    del module, optimizer, loader
    gc.collect()
    assert [model() for model in models] == [None] * 6
    assert not engine._counter.samplers and not engine._captures
    assert sorted(engine.accountant.history) == [(3.0, 1 / 3, 1)] * 3 + [(4.0, 1 / 3, 1)] * 3


def test_models_that_are_gone_share_no_batch_with_those_after_them():
    """What tells batches apart must not come again, as an address does."""
    engine = PrivacyEngine(accountant="rdp")
    for _ in range(20):
        model = nn.Linear(3, 2).to(D)
        module, optimizer = privatize(model, engine=engine, noise_multiplier=2.0, expected_batch_size=4)
        backward(module, torch.randn(4, 3, dtype=D))
        optimizer.step()
        del model, module, optimizer
        gc.collect()
    assert engine.accountant.history == [(2.0, 0.1, 20)]


def test_a_draw_outlives_its_loader_as_long_as_its_model():
    engine, _, module, optimizer, loader = private(None, noise=2.0)
    (batch,) = next(iter(loader))
    del loader
    gc.collect()
    for _ in range(4):
        backward(module, batch)
        optimizer.step()
        optimizer.zero_grad()
    assert engine.accountant.history == [(pytest.approx(1.0), 1 / 3, 1)]


def test_a_checkpoint_of_the_run_itself_leaves_steps_on_one_draw_one_mechanism(tmp_path):
    engine, _, module, optimizer, loader = private(None, noise=2.0)
    batches = iter(loader)
    (batch,) = next(batches)
    backward(module, batch)
    optimizer.step()
    engine.save_checkpoint(path=tmp_path / "c.pt", module=module, optimizer=optimizer)
    engine.load_checkpoint(path=tmp_path / "c.pt", module=module, optimizer=optimizer)
    backward(module, batch)
    optimizer.step()
    assert engine.accountant.history == [(pytest.approx(2.0**0.5), 1 / 3, 1)]


def test_an_accountant_that_refuses_keeps_its_history():
    engine = PrivacyEngine(accountant="gdp")
    parts = two_models(engine)
    (batch,) = next(iter(parts[0][2]))
    for which, (module, optimizer, _) in enumerate(parts):
        backward(module, batch)
        if which:
            engine.accountant.history = [(9.0, 1 / 3, 5), (3.0, 1 / 3, 1)]
            with pytest.raises(ValueError):
                optimizer.step()
            assert engine.accountant.history == [(9.0, 1 / 3, 5), (3.0, 1 / 3, 1)]
        else:
            optimizer.step()


def test_numbers_that_change_in_place_are_counted_as_they_were():
    engine, _, module, optimizer, loader = private(None, noise=2.0)
    optimizer.noise_multiplier = torch.tensor(2.0)
    for (batch,) in loader:
        backward(module, batch)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.noise_multiplier.mul_(2.0)
    assert engine.accountant.history == [(2.0, 1 / 3, 1), (4.0, 1 / 3, 1), (8.0, 1 / 3, 1)]
    assert all(type(number) is float for *pair, _ in engine.accountant.history for number in pair)


def test_steps_on_draws_of_their_own_stay_steps_of_their_own():
    engine, _, module, optimizer, loader = private(3, noise=2.0)
    for _ in range(2):
        for (batch,) in loader:
            backward(module, batch)
            optimizer.step()
            optimizer.zero_grad()
    assert engine.accountant.history == [(2.0, 1 / 3, 6)]


# Settings --------------------------------------------------------------------------------------------


def test_a_second_optimizer_cannot_change_what_a_record_is():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).to(D)
    engine = PrivacyEngine()
    settings = dict(
        noise_multiplier=0.0, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=4, loss_reduction="sum"
    )
    module, _first = engine.privatize(
        model, torch.optim.SGD(model[0].parameters(), lr=0.1), rows_per_record=4, **settings
    )
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="4 for another optimizer"):
        engine.privatize(module, optimizer, rows_per_record=2, **settings)
    _, second = engine.privatize(module, optimizer, verify_first_step=False, **settings)
    assert second.capture.rows_per_record == 4 and second.capture.first_batch.waiting


def not_drawn_by_coins(records: int, batch_size: int):
    model = nn.Linear(3, 2)
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(records, 3)), batch_size=batch_size),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )


def test_batches_that_are_not_drawn_by_coins_count_as_large_as_they_are():
    _, optimizer, _ = not_drawn_by_coins(10_001, batch_size=10_000)
    assert optimizer.sensitivity() > 1 + 2 * 10_000 * 74 * 2.0**-24


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("why", ["empty", "not finite"])
def test_a_draw_that_has_no_step_is_missed(workers: int, why: str):
    """What a record decides is known by it: one that is drawn alone, one that is not finite."""
    size = {"empty": 1, "not finite": 8}[why]
    engine, _, module, optimizer, loader = private(None, batch_size=size, workers=workers)
    if why == "not finite":
        loader.dataset.tensors[0][3] = torch.nan
    with pytest.raises(ValueError, match="a batch before this one had no step"):
        for _ in range(40):
            for (batch,) in loader:
                if len(batch) == 0 or not batch.isfinite().all():
                    continue
                backward(module, batch)
                optimizer.step()
    assert not optimizer._sums
    before = sum(steps for *_, steps in engine.accountant.history)
    for (batch,) in loader:
        if len(batch):
            backward(module, batch)
        optimizer.step()
    assert sum(steps for *_, steps in engine.accountant.history) == before + len(loader)


def test_the_rounding_of_batches_that_are_merged_is_that_of_all_of_them():
    stated = []
    module, optimizer, loader = not_drawn_by_coins(1000, batch_size=10)
    optimizer.attach_step_hook(lambda o: stated.append(o.sensitivity()))
    for number, (batch,) in enumerate(loader):
        record_loss(module(batch)).mean().backward()
        optimizer.signal_skip_step(do_skip=number < 99)
        optimizer.step()
    assert stated[0] > 1 + 2 * 1000 * 74 * 2.0**-24
