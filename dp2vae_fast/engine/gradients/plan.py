"""By which of the exact ways every parameter's per-sample gradients are clipped and summed.

``gram``    the norm by Gram matrices, then the weighted sum of all records at once: no gradient ever exists
``direct``  each gradient is formed, squared and forgotten, then the weighted sum as above
``kept``    each gradient is formed once and kept; norm and weighted sum are reads

They differ in time, in memory and in how far the error bound of the norm lies above it. So the choice must not depend
on how many records were drawn: one record more could change the factors of all the others. It is made from the sizes of
one record, by a cost model (:mod:`.cost`) or by timing the ways on random numbers (:mod:`.timing`), under a budget of
memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...ops import native_kernels
from ..precision import MAX_POSITIONS
from . import timing
from .cost import METHODS, NATIVE, REFERENCE, Cost, Method
from .gradient import Gradient
from .products import Product

Key = tuple[str, Cost]
# A way predicted to take so many times as long as the fastest is not timed.
_HOPELESS = 4.0


@dataclass(frozen=True)
class Choice:
    """One row of the plan: a parameter's gradients, and what every way of taking them costs.

    Attributes:
        predicted: nanoseconds a record, of every way that there is.
        measured: the same, of those that were timed.
    """

    parameter: str
    cost: Cost
    method: Method
    predicted: Mapping[Method, float]
    measured: Mapping[Method, float]

    @property
    def times(self) -> Mapping[Method, float]:
        """What was chosen by."""
        return self.measured or self.predicted

    @property
    def held(self) -> int:
        """Bytes a record that the chosen way holds until the weighted sum."""
        return self.cost.held(self.method)


@dataclass
class Plan:
    """Chooses and remembers.

    Args:
        forced: parameter name -> way, overriding everything.
        max_memory_overhead: peak memory of a step over that of an ordinary one, as far as layers' inputs, outputs and
            kept gradients decide it; an ordinary step is taken to hold the inputs and outputs of all layers when its
            backward pass begins, as where each is followed by a norm layer or an activation. ``math.inf``: the fastest
            way for all.
        measure: time the ways on random numbers the first time that a shape is seen on this machine.
        public_shapes: how many positions a record has in a batch is public, and may differ between batches. Otherwise a
            second number is refused: where it is that of the longest record, this one would change others' factors.

    Attributes:
        choices: the latest, by parameter.
    """

    forced: Mapping[str, Method] = field(default_factory=dict)
    max_memory_overhead: float = 1.25
    measure: bool = False
    public_shapes: bool = False
    choices: dict[str, Choice] = field(default_factory=dict, init=False)
    _settled: dict[Key, Choice] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if unknown := [m for m in self.forced.values() if m not in METHODS]:
            raise ValueError(f"a plan cannot force {unknown[0]!r}: choose among {', '.join(METHODS)}")
        if not self.max_memory_overhead >= 1.0:
            raise ValueError(f"max_memory_overhead is {self.max_memory_overhead}: it is a ratio of at least 1")

    def prepare(self, gradients: Sequence[tuple[str, Gradient]]) -> None:
        """Choose for the gradients of one backward pass, in its order, where any of them is new.

        Raises:
            ValueError: one has another number of positions than before, and nobody said that this is public.
        """
        keyed = [(name, g, g.cost) for name, g in gradients if isinstance(g, Product)]
        if all((name, cost) in self._settled for name, _, cost in keyed):
            return
        for name, _, cost in keyed:
            before = self.choices[name].cost.positions if name in self.choices else cost.positions
            if before != cost.positions and not self.public_shapes:
                raise ValueError(
                    f"parameter {name!r} has {cost.positions} positions a record here and had {before} before: "
                    "should the longest record decide that (padding), it would change how others are clipped. Pad to "
                    "one public size, or pass plan=Plan(public_shapes=True) where sizes are public"
                )
        choices = [self._settled.get((name, cost)) or self._candidate(name, g, cost) for name, g, cost in keyed]
        for choice in self._within_budget(choices):
            self.choices[choice.parameter] = self._settled[choice.parameter, choice.cost] = choice

    def realize(self, parameter: str, gradient: Gradient) -> Gradient:
        """``gradient`` in the form chosen for it."""
        if not isinstance(gradient, Product):
            return gradient
        key = parameter, gradient.cost
        if key not in self._settled:
            self.prepare([(parameter, gradient)])
        method = self._settled[key].method
        return gradient.kept() if method == "kept" else gradient.directly() if method == "direct" else gradient

    def kept_at_once(self, parameter: str, gradient: Gradient) -> Gradient:
        """The gradient kept, where that has been chosen already, so that its operands can go."""
        if not isinstance(gradient, Product):
            return gradient
        choice = self._settled.get((parameter, gradient.cost))
        return gradient.kept() if choice is not None and choice.method == "kept" else gradient

    def _candidate(self, parameter: str, gradient: Product, cost: Cost) -> Choice:
        rates = NATIVE if native_kernels() and gradient.device.type == "cpu" else REFERENCE
        usable: list[Method] = [
            m for m in METHODS if m in gradient.ways() and (m == "kept" or cost.positions <= MAX_POSITIONS)
        ]
        forced = self.forced.get(parameter)
        if forced is not None and forced not in usable:
            reason = "which such gradients do not have"
            if forced in gradient.ways():
                reason = f"summed over {cost.positions} positions, more than {MAX_POSITIONS}"
            raise ValueError(
                f"parameter {parameter!r} cannot be taken by {forced!r}, {reason}: force 'kept', or nothing"
            )
        predicted: dict[Method, float] = {m: rates.time(cost, m) for m in usable}
        if forced is not None:
            return Choice(parameter, cost, forced, predicted, {})
        measured: dict[Method, float] = {}
        if self.measure:
            hopeful: list[Method] = [m for m in usable if predicted[m] <= _HOPELESS * min(predicted.values())]
            measured = {m: timing.measured(gradient, m) for m in hopeful}
        times = measured or predicted
        fastest: Method = min(times, key=lambda m: times[m])
        return Choice(parameter, cost, fastest, predicted, measured)

    def _within_budget(self, choices: list[Choice]) -> list[Choice]:
        """The choices, changed one by one where that frees most memory for its time, until the budget is kept."""
        choices = list(choices)
        while (before := memory_overhead(choices)) > self.max_memory_overhead:
            best, found = 0.0, None
            for i, choice in enumerate(choices):
                for method in choice.times if self._is_free(choice) else ():
                    other = replace(choice, method=method)
                    freed = before - memory_overhead([*choices[:i], other, *choices[i + 1 :]])
                    slower = choice.times[method] - choice.times[choice.method]
                    worth = freed / max(slower, 1e-9)
                    if freed > 0 and worth > best:
                        best, found = worth, (i, other)
            if found is None:
                break
            choices[found[0]] = found[1]
        return choices

    def _is_free(self, choice: Choice) -> bool:
        """Whether it can be changed: one that was made for earlier batches stays, whatever else appears."""
        return choice.parameter not in self.forced and (choice.parameter, choice.cost) not in self._settled


def memory_overhead(choices: Sequence[Choice]) -> float:
    """Peak of a backward pass through these gradients, the last layer first, over an ordinary one's (:class:`Plan`)."""
    waiting = sum(c.cost.operands for c in choices)
    if waiting == 0:
        return 1.0
    ordinary, held, peak = waiting, 0, waiting
    for choice in choices:
        waiting -= choice.cost.operands
        held += choice.held
        peak = max(peak, waiting + held)
    return peak / ordinary
