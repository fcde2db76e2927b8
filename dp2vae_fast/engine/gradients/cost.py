"""What a parameter's per-sample gradients cost, in time and memory, by each of the exact ways to clip and sum them.

The model is a straight line through few figures of one core; it has to order the ways, not to tell the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Method = Literal["gram", "direct", "kept"]
METHODS: tuple[Method, ...] = get_args(Method)


class Cost(NamedTuple):
    """Sizes of one record's gradient: a sum over ``positions`` of products of ``inputs`` by ``outputs`` numbers.

    Attributes:
        positions: T, over which a product sums.
        inputs: D, of a convolution channels times taps of a group.
        outputs: P.
        gram: multiply-adds of the norm by Gram matrices, both halves counted.
        activations, backprops: bytes of the operands.
    """

    positions: int
    inputs: int
    outputs: int
    gram: int = 0
    activations: int = 0
    backprops: int = 0

    @property
    def numbers(self) -> int:
        """Elements of the gradient."""
        return self.inputs * self.outputs

    @property
    def operands(self) -> int:
        """Bytes of both operands."""
        return self.activations + self.backprops

    def held(self, method: Method) -> int:
        """Bytes held from the layer's backward pass to the weighted sum."""
        return 4 * self.numbers if method == "kept" else self.operands


@dataclass(frozen=True)
class Rates:
    """What a core does in a nanosecond, or how many nanoseconds something takes it.

    Attributes:
        product: multiply-adds of products and weighted sums.
        gram: multiply-adds of Gram matrices, both halves counted.
        packed: ns to bring one number of an operand where it is multiplied.
        added: ns to add one number of a record's product to the sum.
        kept: ns to write one number of a gradient that is kept, and read it back.
    """

    product: float
    gram: float
    packed: float
    added: float
    kept: float

    def time(self, cost: Cost, method: Method) -> float:
        """Nanoseconds a record: norm, and share of the weighted sum."""
        product = cost.positions * cost.numbers / self.product
        packed = cost.operands / 4 * self.packed
        weighted = product + packed + (self.added * cost.numbers if cost.positions > 1 else 0.0)
        if method == "gram":
            return cost.gram / self.gram + packed + weighted
        if method == "direct":
            return product + packed + weighted
        return product + packed + self.kept * cost.numbers


# Of the C++ kernels with AVX-512 on a 2.7 GHz Xeon (benchmarks/NOTES.md), and of the reference ops there. With narrower
# vectors all of them take longer alike.
NATIVE = Rates(product=75.0, gram=110.0, packed=0.3, added=0.035, kept=1.0)
REFERENCE = Rates(product=25.0, gram=15.0, packed=1.0, added=0.0, kept=1.5)
