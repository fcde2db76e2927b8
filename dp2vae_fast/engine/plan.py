"""Which parameters' per-sample gradients are formed and kept, and which never exist.

Both roads are exact; they differ in time, in memory and in how far the error bound of the norm lies above it. So the
choice must not depend on how many records were drawn: one record more could change the factors of all the others.
``product`` takes the norm by Gram matrices and the weighted gradient by the vendor library afterwards; ``kept`` forms
each record's gradient once, after which norm and weighted sum are reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .gradients import Cost, Gradient, Kept
from .precision import MAX_POSITIONS

Method = Literal["product", "kept"]

# Cost of writing and reading back one number of a kept gradient, in multiply-adds of a matrix product. Measured on
# a two-core x86-64 CPU on transposed convolutions of 16 to 1024 positions; it only moves the crossover.
_KEPT_NUMBER = 60.0
# From so many positions on, float32 Gram norms of incoherent gradients have error bounds above one per cent, and are
# mostly taken again in float64 (`clipping.bounded_norms`): what that costs, in Gram norms of float32.
_LOOSE_POSITIONS, _REPEATED = 256, 3.0
# A weighted sum over positions is formed in float64: what that costs, in float32 products.
_WIDE = 3.0


@dataclass(frozen=True)
class Choice:
    """One row of the plan's table, for one record. Costs are multiply-adds, for comparison with each other only."""

    parameter: str
    method: Method
    cost: Cost
    product_cost: float
    kept_cost: float
    kept_bytes: int


@dataclass
class Plan:
    """Chooses and remembers, per parameter and shape.

    Args:
        forced: parameter name -> method, overriding the cost model.
        exact_sums: weighted sums over positions are formed in float64 (:mod:`.precision`), which costs products more.
        max_kept_bytes: budget for one record's kept gradient of one parameter; above it a product is used. Gradients
            that a rule forms anyway (biases, affine scales, the vmap fallback) are not counted.
    """

    forced: dict[str, Method] = field(default_factory=dict)
    max_kept_bytes: int = 2**20
    exact_sums: bool = True
    choices: dict[str, Choice] = field(default_factory=dict)

    def realize(self, parameter: str, gradient: Gradient) -> Gradient:
        """``gradient`` in the form chosen for it."""
        if isinstance(gradient, Kept):
            return gradient
        choice = self.choices.get(parameter)
        if choice is None or choice.cost != gradient.cost():
            choice = self.choices[parameter] = self._choose(parameter, gradient.cost())
        return gradient.kept() if choice.method == "kept" else gradient

    def _choose(self, parameter: str, c: Cost) -> Choice:
        product = c.form * (_WIDE if c.positions > 1 and self.exact_sums else 1.0)
        product += c.gram * (_REPEATED if c.positions >= _LOOSE_POSITIONS else 1.0)
        kept = c.form + _KEPT_NUMBER * c.numbers
        kept_bytes = 4 * c.numbers
        cheaper: Method = "kept" if kept < product and kept_bytes <= self.max_kept_bytes else "product"
        if c.positions > MAX_POSITIONS:
            cheaper = "kept"
            if self.forced.get(parameter) == "product":
                raise ValueError(
                    f"parameter {parameter!r} cannot be a product over {c.positions} positions, more than "
                    f"{MAX_POSITIONS}: force 'kept', or nothing"
                )
        return Choice(parameter, self.forced.get(parameter, cheaper), c, product, kept, kept_bytes)
