"""Declare an op once; choose among its implementations visibly.

An op is a plain-PyTorch function with type hints. The hints are its schema, its body is its reference::

    @op(mutates=("x",), native=lambda x, scale: x.is_contiguous() or "x is not contiguous")
    def scale_(x: Tensor, scale: float) -> None:
        x.mul_(scale)

The decorator registers ``torch.ops.dp2vae_fast.scale_`` with one overload per way of running it:

``default``    the C++ (CPU) or CUDA kernel where ``csrc`` implements one, else the reference
``reference``  the body, always
``triton``     a Python-side implementation, once ``register`` has supplied one

Every overload is an opaque, fake-able node, so whichever runs compiles without a graph break. Ops record no
gradient.

``scale_(x, 2.0)`` takes the first usable backend of the visible order (``ORDER``). An explicit request, by
``backend=``, ``with backend("..."):`` or ``DP2VAE_FAST_BACKEND`` (read at import), runs exactly that backend
or raises; ``"triton,reference"`` requests an order of one's own.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

NAMESPACE = "dp2vae_fast"
BACKENDS = ("cpp", "cuda", "triton", "reference")
ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
OPS: dict[str, Op[Any]] = {}

_DISPATCH_KEY = {"cpp": "CPU", "cuda": "CUDA"}
_DEVICE = {"cpp": "cpu", "cuda": "cuda"}
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # at module level: its ops vanish with it

R = TypeVar("R")
Supports = Callable[..., "bool | str"]
Fits = Callable[..., str]


class BackendRow(NamedTuple):
    """One line of `backends_table`: whether `op` has an implementation on `backend`, and if not, why not."""

    op: str
    backend: str
    available: bool
    reason: str


@dataclass(frozen=True)
class _Implementation:
    overload: Callable[..., Any]
    supports: Supports | None


def _load_module(name: str, which: str, remedy: str) -> str:
    """Import a compiled module, whose import registers its kernels; return the reason where that fails."""
    try:
        importlib.import_module(f"{NAMESPACE}.{name}")
    except ModuleNotFoundError:
        return f"the {which} module is not built (reinstall with {remedy})"
    except ImportError as error:
        return f"the {which} module does not load ({error})"
    return ""


def load_triton() -> str:
    """Import the Triton kernels, which register themselves; return the reason where that fails.

    Left until first asked for where no GPU can be present: importing Triton takes a third of a second.
    """
    global _triton_gap
    if _triton_gap is None:
        try:
            importlib.import_module("triton")
            importlib.import_module(f"{NAMESPACE}.kernels")
            _triton_gap = ""
        except ImportError as error:
            _triton_gap = f"triton does not import ({error})"
    return _triton_gap


def _parse_order(request: str) -> tuple[str, ...]:
    order = tuple(name.strip() for name in request.split(","))
    for name in order:
        if name not in BACKENDS:
            raise ValueError(f"backend {name!r} is unknown: choose among {', '.join(BACKENDS)}")
    return order


_native_gap = _load_module("_C", "native", "a C++ compiler")
_cuda_gap = _load_module("_cuda", "CUDA", "nvcc and a CUDA build of torch")
_triton_gap: str | None = None

# Process-wide on purpose, not thread-local: autograd runs backward hooks, and so the ops in them, on threads
# of its own.
_requested: tuple[str, ...] | None = (
    _parse_order(os.environ["DP2VAE_FAST_BACKEND"]) if os.environ.get("DP2VAE_FAST_BACKEND") else None
)
if _native_gap and _requested is None:
    warnings.warn(f"dp2vae_fast runs on its plain-PyTorch reference ops: {_native_gap}", stacklevel=2)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block on `name` (or on the first usable of ``"name,name"``), or raise.

    Process-wide for the duration of the block, so that ops called from backward hooks follow it too.

    Raises:
        ValueError: `name` is not one of ``cpp``, ``cuda``, ``triton``, ``reference``.
    """
    global _requested
    outer, _requested = _requested, _parse_order(name)
    try:
        yield
    finally:
        _requested = outer


class Op(Generic[R]):
    """A declared op: call it, or ask for one of its implementations. Made by `op`."""

    def __init__(
        self, function: Callable[..., R], mutates: Sequence[str], native: Supports | None, fits: Fits | None
    ) -> None:
        functools.update_wrapper(self, function)
        self.name = function.__name__
        self._signature = inspect.signature(function)
        self._names = tuple(self._signature.parameters)
        self.mutates = tuple(mutates)
        self._fits = fits
        self.reference: Callable[..., R] = torch.no_grad()(function)
        self._schema = torch.library.infer_schema(function, mutates_args=self.mutates)
        default = self._define("default", self.reference)  # first: what torch.ops calls where no overload is named
        self._implementations: dict[str, _Implementation] = {
            "reference": _Implementation(self._define("reference", self.reference), None)
        }
        for name, key in _DISPATCH_KEY.items():
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{self.name}", key):
                self._implementations[name] = _Implementation(default, native)
        OPS[self.name] = self

    def __repr__(self) -> str:
        return f"<op {NAMESPACE}.{self.name}>"

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> R:
        if kwargs or len(args) != len(self._names):
            args = self._in_order(args, kwargs)
        if self._fits is not None and (wrong := self._fits(*args)):
            raise ValueError(f"{self.name}: {wrong}")
        device = _device_type(args)
        order = _requested if backend is None else _parse_order(backend)
        if order is None:
            order = ORDER.get(device, ("reference",))
        for name in order:
            if self._gap(name, device, args) == "":
                return self._implementations[name].overload(*args)
        raise NotImplementedError(self._explain(order, device, args))

    def register(self, name: str, supports: Supports | None = None) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Decorate a Python-side implementation of this op, such as a Triton launcher.

        `supports` takes the op's arguments and returns True, or the reason why it cannot run on them.
        """

        def decorate(function: Callable[..., R]) -> Callable[..., R]:
            if name not in BACKENDS or name in self._implementations:
                raise ValueError(f"{self.name}: backend {name!r} is unknown or already implemented")
            overload = self._define(name, torch.no_grad()(function))
            self._implementations[name] = _Implementation(overload, supports)
            return function

        return decorate

    def missing(self, name: str) -> str:
        """Why this op has no implementation on backend `name` here; the empty string where it has one."""
        if name in self._implementations:
            return ""
        if name == "triton" and _triton_gap is None:
            return load_triton() or self.missing(name)
        reason = {"cpp": _native_gap, "cuda": _cuda_gap, "triton": _triton_gap}[name]
        return reason or f"no {name} kernel for this op"

    def _in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Every argument by position, which is how the conditions of implementations take them."""
        rest = self._names[len(args) :]
        if len(rest) == len(kwargs) > 0 and all(name in kwargs for name in rest):
            return (*args, *[kwargs[name] for name in rest])
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}; it takes {', '.join(self._names)}") from None
        bound.apply_defaults()
        return bound.args

    def _gap(self, name: str, device: str, args: tuple[Any, ...]) -> str:
        """Why backend `name` cannot run this call on `device`; the empty string where it can."""
        if name not in self._implementations and (gap := self.missing(name)):
            return gap
        if device != _DEVICE.get(name, device):
            return f"it runs on {_DEVICE[name]} tensors only, these are on {device}"
        supports = self._implementations[name].supports
        verdict = True if supports is None else supports(*args)
        if verdict is True:
            return ""
        return verdict or "it does not support these arguments"

    def _explain(self, order: Sequence[str], device: str, args: tuple[Any, ...]) -> str:
        gaps = "; ".join(f"{name}: {self._gap(name, device, args)}" for name in order)
        usable = [name for name in BACKENDS if self._gap(name, device, args) == ""]
        return f"op {self.name} cannot run as requested ({gaps}). Usable here: {', '.join(usable) or 'none'}"

    def _define(self, overload: str, kernel: Callable[..., R]) -> Callable[..., Any]:
        qualified = self.name if overload == "default" else f"{self.name}.{overload}"
        _LIBRARY.define(qualified + self._schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(qualified, kernel, "CompositeExplicitAutograd")
        handle = getattr(getattr(getattr(torch.ops, NAMESPACE), self.name), overload)
        _LIBRARY.impl(qualified, torch.library.fallthrough_kernel, "Autograd")
        if self.mutates:
            torch.library.register_fake(handle, lambda *args, **kwargs: None, lib=_LIBRARY)
            _LIBRARY.impl(qualified, _version_bumping(handle), "ADInplaceOrView", with_keyset=True)
        else:
            torch.library.register_fake(handle, self.reference, lib=_LIBRARY)
        return handle


def op(
    mutates: Sequence[str] = (), native: Supports | None = None, fits: Fits | None = None
) -> Callable[[Callable[..., R]], Op[R]]:
    """Declare an op whose reference is the decorated function's body and whose schema is its type hints.

    Args:
        mutates: names of the arguments that the op writes to; such an op returns None.
        native: takes the op's arguments and returns True, or the reason why the kernels of ``csrc`` cannot run on
            them. Whether such kernels exist is looked up by the op's name.
        fits: takes the op's arguments and returns the empty string, or why no backend may run on them. Called before
            a backend is chosen, so at every call: no more than a few comparisons of sizes.

    The reference of a functional op is also its fake kernel, so it must not read tensor values in Python.
    """
    return lambda function: Op(function, mutates, native, fits)


def backends_table() -> list[BackendRow]:
    """Every op and backend, with the reason for each gap: what ``dp2vae info`` prints."""
    return [
        BackendRow(name, backend, not (reason := declared.missing(backend)), reason)
        for name, declared in sorted(OPS.items())
        for backend in BACKENDS
    ]


def device_type(x: Tensor) -> str:
    """The type of its device; of the CPU's, without an object for the device."""
    return "cpu" if x.is_cpu else x.device.type


def _device_type(args: tuple[Any, ...]) -> str:
    """Device type of the first tensor among the arguments, lists included."""
    for argument in args:
        if isinstance(argument, (list, tuple)):
            argument = argument[0] if argument else None
        if isinstance(argument, Tensor):
            return device_type(argument)
    return "cpu"


def _version_bumping(handle: Any) -> Callable[..., None]:
    """Tell autograd of the mutation, so that changing a tensor saved for backward raises, as it should."""
    written = [
        (position, argument.name)
        for position, argument in enumerate(handle._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> None:
        for position, name in written:
            value = args[position] if position < len(args) else kwargs.get(name, ())
            torch.autograd.graph.increment_version([value] if isinstance(value, Tensor) else value)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            handle.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    return kernel
