"""Files are whole or absent; the ledger counts a step before its noise can be drawn."""

import os

import pytest
import small
import torch

from dp2vae_fast.engine.accounting import Mechanism
from dp2vae_fast.runs import folder as folder_module
from dp2vae_fast.runs import ledger as ledger_module
from dp2vae_fast.runs.checkpoint import (
    RunError,
    load_checkpoint,
    remove_temporaries,
    save_checkpoint,
    write_atomic,
    write_json,
)
from dp2vae_fast.runs.folder import RunFolder
from dp2vae_fast.runs.ledger import BLOCK, RECORD, Ledger

STEPS = Mechanism("DP-SGD", 1.3, 0.1, 100)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run" / "curator").mkdir(parents=True)
    return tmp_path / "run" / "curator" / "ledger"


def reopened(ledger, path):
    ledger.close()
    return Ledger(path)


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})

    def fail(stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(file, fail)
    assert file.read_text() == '{\n  "a": 1\n}\n' and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(ValueError):
        write_json(file, {"a": float("nan")})
    assert file.read_text() == '{\n  "a": 1\n}\n' and os.listdir(tmp_path) == ["a.json"]


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "keep.tmp").write_bytes(b"mine")
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["keep.tmp"]


def test_checkpoints_round_trip_and_a_damaged_one_is_refused(tmp_path):
    file = tmp_path / "checkpoint.pt"
    assert load_checkpoint(file) is None
    save_checkpoint(file, {"step": 3, "decoder": {"w": torch.arange(5.0)}})
    state = load_checkpoint(file)
    assert state is not None and state["step"] == 3 and torch.equal(state["decoder"]["w"], torch.arange(5.0))
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        file.write_bytes(damaged)
        with pytest.raises(RunError, match="cannot be read"):
            load_checkpoint(file)


def test_the_file_counts_a_step_before_reserve_returns(path):
    ledger = Ledger(path)
    for step in range(1, 3 * BLOCK):
        ledger.reserve(STEPS, step, last=100)
        records = [ledger_module._decode(r) for r in _records(path)]
        on_disk = max(r["steps"] for r in records if r and r["name"] == "DP-SGD")
        assert step <= on_disk < step + BLOCK
    assert len(_records(path)) == 3


def test_reserving_never_goes_beyond_the_planned_number(path):
    ledger = Ledger(path)
    ledger.reserve(STEPS, 98, last=99)
    assert ledger.steps("DP-SGD") == 99
    ledger.reserve(Mechanism("class means", 4.0), 1)
    assert ledger.steps("class means") == 1


def test_after_a_crash_the_whole_block_is_spent_after_a_clean_stop_the_exact_number(path):
    ledger = Ledger(path)
    ledger.reserve(STEPS, 3, last=100)
    ledger = reopened(ledger, path)
    assert ledger.steps("DP-SGD") == BLOCK
    ledger.reserve(STEPS, BLOCK + 2, last=100)
    ledger.settle(STEPS, BLOCK + 2)
    assert reopened(ledger, path).spent() == (Mechanism("DP-SGD", 1.3, 0.1, BLOCK + 2),)


def test_settling_cannot_add_steps(path):
    ledger = Ledger(path)
    ledger.reserve(STEPS, 1, last=100)
    ledger.settle(STEPS, 50)
    assert ledger.steps("DP-SGD") == BLOCK


def test_settling_never_takes_back_what_an_earlier_process_may_have_drawn(path):
    ledger = Ledger(path)
    ledger.reserve(STEPS, BLOCK + 1, last=100)
    ledger = reopened(ledger, path)
    ledger.settle(STEPS, 3)
    assert ledger.steps("DP-SGD") == reopened(ledger, path).steps("DP-SGD") == 2 * BLOCK


def test_keys_are_numbered_and_know_what_was_spent_before_them(path):
    ledger = Ledger(path)
    assert ledger.begin_key("a") == 0 and ledger.steps_before_key("DP-SGD") == 0
    ledger.reserve(STEPS, 5, last=100)
    ledger = reopened(ledger, path)
    assert (ledger.key_number, ledger.replay, ledger.steps_before_key("DP-SGD")) == (0, "a", 0)
    assert ledger.begin_key("b") == 1 and ledger.steps_before_key("DP-SGD") == BLOCK
    ledger = reopened(ledger, path)
    assert (ledger.key_number, ledger.replay, ledger.steps_before_key("DP-SGD")) == (1, "b", BLOCK)


@pytest.mark.parametrize("keep", [1, RECORD // 2, RECORD - 1])
def test_a_torn_last_record_is_dropped_and_the_file_goes_on(path, keep):
    ledger = Ledger(path)
    ledger.reserve(STEPS, 1, last=100)
    ledger.reserve(STEPS, BLOCK + 1, last=100)
    ledger.close()
    path.write_bytes(path.read_bytes()[: RECORD + keep])
    ledger = Ledger(path)
    assert ledger.steps("DP-SGD") == BLOCK
    ledger.reserve(STEPS, BLOCK + 1, last=100)
    assert reopened(ledger, path).steps("DP-SGD") == 2 * BLOCK and path.stat().st_size == 2 * RECORD


def test_a_last_record_of_zeros_is_dropped_damage_before_it_is_refused(path):
    ledger = Ledger(path)
    for step in (1, BLOCK + 1, 2 * BLOCK + 1):
        ledger.reserve(STEPS, step, last=100)
    ledger.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * RECORD] + bytes(RECORD))
    ledger = Ledger(path)
    assert ledger.steps("DP-SGD") == 2 * BLOCK
    ledger.close()
    path.write_bytes(whole[:RECORD] + whole[RECORD : 2 * RECORD].replace(b"16", b"10") + whole[2 * RECORD :])
    for _ in range(2):  # and the refusal leaves no lock behind
        with pytest.raises(RunError, match="damaged at record 2"):
            Ledger(path)


def test_two_processes_cannot_share_a_ledger(path):
    ledger = Ledger(path)
    with pytest.raises(RunError, match="another process"):
        Ledger(path)
    reopened(ledger, path).close()


def test_a_mechanism_cannot_change_under_its_name(path):
    ledger = Ledger(path)
    ledger.reserve(STEPS, 1, last=100)
    with pytest.raises(RunError, match="at another noise or rate"):
        ledger.reserve(Mechanism("DP-SGD", 0.5, 0.1, 100), 2, last=100)


def _records(path):
    data = path.read_bytes()
    assert len(data) % RECORD == 0
    return [data[i : i + RECORD] for i in range(0, len(data), RECORD)]


def test_who_is_refused_the_lock_removes_nothing(tmp_path, monkeypatch):
    """Two processes that start at once both find the folder missing; its identity and ledger are the first one's."""
    settings, out = small.config(), tmp_path / "run"
    with RunFolder(out, resume=False, config=settings, data_sha256="data"):
        monkeypatch.setattr(folder_module, "_make_folder", lambda folder: [folder, folder.parent])
        with pytest.raises(RunError, match="another process is training"):
            RunFolder(out, resume=True, config=settings, data_sha256="data")
        assert {p.name for p in (out / "curator").iterdir()} == {"ledger", "run.json"}


def test_the_ledger_of_a_run_that_was_given_up_is_not_taken_over(path, monkeypatch):
    """Locked just after its owner has removed it, it would be no file of the folder any more."""
    monkeypatch.setattr(ledger_module.fcntl, "flock", lambda *_: path.unlink())
    with pytest.raises(RunError, match="start again"):
        Ledger(path)


def test_a_run_does_not_change_its_engine_on_the_way(tmp_path):
    """Its report says what the engine's rounding covers."""
    settings = small.config()
    with RunFolder(tmp_path / "run", resume=False, config=settings, data_sha256="data") as run:
        run.ledger.reserve(STEPS, 1, last=2)
    with pytest.raises(RunError, match="engine was 'fused' and is now 'opacus'"):
        RunFolder(tmp_path / "run", resume=True, config=small.config(engine="opacus"), data_sha256="data")
