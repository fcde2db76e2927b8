"""Fixtures that more than one file of tests takes."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this when it is imported: without a GPU its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

from streams import _C, ISAS


@pytest.fixture
def each_isa():
    """Iterates over the instruction sets of this machine, selecting each; the one in use is restored."""
    before = _C.build_info()["isa"] if _C else ""

    def select():
        for isa in ISAS:
            assert _C.select_isa(isa) and _C.build_info()["isa"] == isa
            yield isa

    yield select
    if _C:
        _C.select_isa(before)


@pytest.fixture
def each_thread_count():
    before = torch.get_num_threads()

    def select():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            yield threads

    yield select
    torch.set_num_threads(before)
