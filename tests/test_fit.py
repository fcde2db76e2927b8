"""What no backend may run on: the same one line from all of them, with the native module and without."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp2vae_fast import ops
from dp2vae_fast.ops import _fit


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


PLAIN = [8, 1, 3, 3], [2, 2], [1, 1], [1, 1], 1, False  # of [N, 1, 8, 8] and [N, 8, 4, 4]
MISFITS: list[tuple[str, tuple, str]] = [
    ("linear_norm_sq", (ones(4, 1, 3), ones(4, 5, 3)), r"activations \[4, 1, 3\], backprops \[4, 5, 3\] given"),
    ("linear_norm_sq", (ones(4, 1, 3), ones(1, 1, 3)), r"expected \[N, T, D\] and \[N, T, P\]"),
    ("linear_kept", (ones(4, 3), ones(4, 5)), r"one axis, by x.unsqueeze\(1\)"),
    ("linear_direct_norm_sq", (ones(4, 2, 2, 3), ones(4, 2, 2, 5)), r"x.flatten\(1, -2\)"),
    ("linear_weighted_sum", (ones(16, 2, 3), ones(16, 2, 4), ones(1)), r"factors \[1\] given, expected \[16\]"),
    ("linear_weighted_sum", (ones(4, 1, 3), ones(4, 2, 3), ones(4)), r"backprops \[4, 2, 3\]"),
    ("outer_weighted_sum", (ones(4, 1, 3), ones(4, 1, 4), ones(4, 1)), r"factors \[4, 1\] given"),
    ("outer_weighted_sum", (ones(4, 2, 3), ones(4, 2, 4), ones(4)), r"expected \[N, 1, D\]"),
    ("kept_weighted_sum", (ones(4, 3), ones(1)), r"factors \[1\] given, expected \[4\]"),
    ("kept_weighted_sum", (ones(4, 3, 2), ones(4)), r"expected \[N, M\]: x.flatten\(1\)"),
    ("embedding_norm_sq", (torch.zeros(4, 1, dtype=torch.int64), ones(4, 5, 3), -1), r"indices \[4, 1\]"),
    ("embedding_norm_sq", (torch.zeros(4, dtype=torch.int64), ones(4, 3), -1), "with an axis of positions"),
    ("group_norm_grad_sample", (ones(2, 4, 3), ones(2, 4, 1), 2, 1e-5), r"expected \[N, C, S\] of both"),
    ("group_norm_grad_sample", (ones(2, 4, 3), ones(2, 4, 3), 3, 1e-5), "groups is 3: it must divide 4 channels"),
    ("layer_norm_grad_sample", (ones(2, 4, 3), ones(1, 4, 3), False, 1e-5), r"expected \[N, R, D\] of both"),
    ("conv_norm_sq", (ones(2, 1, 8, 8), ones(2, 8, 4, 3), *PLAIN), "axis 3 of backprops must be 4 for kernel 3"),
    ("conv_kept", (ones(2, 1, 8, 8), ones(2, 8, 5, 4), *PLAIN), "axis 2 of backprops must be 4"),
    ("conv_direct_norm_sq", (ones(2, 1, 8, 8), ones(2, 8, 3, 4), *PLAIN), "gradient of the layer's whole output"),
    ("conv_weighted_sum", (ones(2, 1, 8, 8), ones(2, 8, 4, 3), ones(2), *PLAIN), "axis 3 of backprops must be 4"),
    ("conv_weighted_sum", (ones(2, 1, 8, 8), ones(2, 8, 4, 4), ones(1), *PLAIN), r"factors \[1\] given"),
    (
        "conv_norm_sq",
        (ones(2, 1, 8, 8), ones(1, 8, 4, 4), *PLAIN),
        r"backprops \[1, 8, 4, 4\] given, expected \[N, C_in",
    ),
    ("conv_norm_sq", (ones(2, 1, 8, 8), ones(2, 8, 4, 4), [8, 1, 3], *PLAIN[1:]), "of 1 to 3 dimensions"),
    ("conv_norm_sq", (ones(2, 1, 8, 8), ones(2, 8, 4, 4), [8, 2, 3, 3], *PLAIN[1:]), r"\[8, 2, 3, 3\] is not \[C_out"),
    ("conv_norm_sq", (ones(2, 1, 8, 8), ones(2, 8, 4, 4), PLAIN[0], [2], *PLAIN[2:]), "for each of 2 spatial"),
    ("conv_norm_sq", (ones(2, 1, 8, 8), ones(2, 8, 4, 4), PLAIN[0], [2, 0], *PLAIN[2:]), "at least 1, padding 0"),
    (
        "conv_kept",
        (ones(2, 8, 4), ones(2, 1, 6), [8, 1, 3], [2], [1], [1], 1, True),
        "axis 2 of backprops must be 7 to 8",
    ),
]


@pytest.mark.parametrize("backend", ["reference", "cpp", None])
@pytest.mark.parametrize("name, arguments, message", MISFITS)
def test_operands_that_do_not_belong_together_are_refused_alike(name: str, arguments, message: str, backend):
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        getattr(ops, name)(*arguments, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpp", None])
def test_a_key_or_step_that_is_no_tensor_is_refused_in_one_line(backend):
    xs, key, step, draw = [ones(3)], torch.zeros(8, dtype=torch.int32), torch.tensor(0), (0, [0], 1.0)
    sgd, adam = (1.0, 0.1, 0.0, 0.0, 0.0, False, False, False), (1.0, 1, 0.1, 0.9, 0.99, 1e-8, 0.0, False, False)
    calls: dict[str, Callable[[Any, Any], None]] = {
        "random_words": lambda key, step: ops.random_words(key, step, 0, 0, 0, 5, backend=backend),
        "add_noise_": lambda key, step: ops.add_noise_(xs, key, step, *draw, backend=backend),
        "noise_sgd_": lambda key, step: ops.noise_sgd_(xs, xs, [], key, step, *draw, *sgd, backend=backend),
        "noise_adam_": lambda key, step: ops.noise_adam_(*[xs] * 4, [], key, step, *draw, *adam, backend=backend),
    }
    for name, call in calls.items():
        expected = rf"^{name}: step is 7, expected a torch.int64 scalar tensor: torch.tensor\(7\)$"
        with pytest.raises(ValueError, match=expected):
            call(key, 7)
        with pytest.raises(ValueError, match=rf"^{name}: key is of type list, expected a torch.int32 tensor \[8\]$"):
            call([0] * 8, step)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_grid_of_a_convolution_is_that_of_its_output(transposed: bool):
    for size, k, s, p, d in itertools.product((4, 5), (1, 3), (1, 2, 3), (0, 1), (1, 2)):
        layer, found = (nn.ConvTranspose1d if transposed else nn.Conv1d), set()
        for more in range(max(s, d) if transposed else 1):
            extra = {"output_padding": more} if transposed else {}
            module = layer(1, 1, k, stride=s, padding=p, dilation=d, device="meta", **extra)
            if size + 2 * p > d * (k - 1) or transposed:
                found.add(module(torch.empty(1, 1, size, device="meta")).shape[2])
        for length in range(1, 30):
            geometry = ([1, 1, k], [s], [p], [d], 1, transposed)
            fits = _fit.convolution(ones(1, 1, size), ones(1, 1, length), *geometry) == ""
            assert fits == (length in found), (size, length, geometry)
