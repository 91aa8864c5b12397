"""What calibration keeps of the activations: streaming reductions that know no module, no hook, no
model.

A statistic is a small frozen description (hashable, so slots can ask for the same one twice and pay
once); `start` gives the accumulator that sees the data. Shapes: x (batch, length, n) inputs of a
site, W (m, n) weight of a linear. Scopes: "site" sees x; "pair" sees x of the dense model and of
the compressed one, for the same tokens; "linear" sees the gradient of W (m, n); "output" sees the
gradient of a linear's outputs (batch, length, m) and its inputs; "decoder_layer" sees its input and
output hidden states.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

# Bumped whenever the same data would give other numbers: part of every cache key.
VERSION = 2
Scope = Literal["site", "pair", "linear", "output", "decoder_layer"]
# What takes a backward pass.
GRADIENT_SCOPES: frozenset[Scope] = frozenset({"linear", "output"})
# One triangle of the Gram is computed, in blocks of this many columns.
GRAM_BLOCK = 192
# Tokens per half-precision product: on a CPU each is rounded once, and the rounding errors of many
# average out.
PRODUCT_TOKENS = 2048


@dataclass(frozen=True)
class Precision:
    """dtype of the running sums, and of the products of activations that are added to them."""

    sums: torch.dtype
    products: torch.dtype


class Accumulator(Protocol):
    """The running state of a statistic for one site, linear or decoder layer."""

    def update(self, *observation: Tensor) -> None:
        """Take in one batch."""

    def value(self) -> Tensor:
        """The statistic of everything seen so far."""

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Become the state after what all processes saw; `total` adds a tensor up over them."""


class Statistic(Protocol):
    """A description of what to accumulate. `sequential`: which samples follow which matters, so
    several processes cannot share the work.
    """

    scope: ClassVar[Scope]
    sequential: ClassVar[bool]

    @property
    def name(self) -> str:
        """Unique and stable: part of the cache key."""

    def start(self, precision: Precision, num_samples: int) -> Accumulator:
        """A fresh accumulator of this precision for a calibration set of num_samples."""


@dataclass(frozen=True)
class Gram:
    """(n, n): sum_t x_t x_t^T, uncentred, not divided by the number of tokens."""

    scope: ClassVar[Scope] = "site"
    sequential: ClassVar[bool] = False
    name: ClassVar[str] = "gram"

    def start(self, precision: Precision, num_samples: int) -> Accumulator:
        """Fresh accumulator."""
        return _GramSum(precision)


@dataclass(frozen=True)
class CrossGram:
    """(n, n): sum_t x_t x'_t^T, x_t a site's input in the dense model and x'_t in the compressed
    one (methods.md F6's C = X X'^T).

    Equals Gram where nothing before the site was compressed.
    """

    scope: ClassVar[Scope] = "pair"
    sequential: ClassVar[bool] = False
    name: ClassVar[str] = "cross_gram"

    def start(self, precision: Precision, num_samples: int) -> Accumulator:
        """Fresh accumulator."""
        return _CrossSum(precision)


@dataclass(frozen=True)
class StackedGram:
    """(n, n): the Gram of bucket means (AdaSVD Sec. 3.1, Eq. 14-15).

    The samples fall into `num_buckets` consecutive buckets of ceil(N / num_buckets) (they are
    already in random order), whose inputs are averaged position by position before the product.
    Tilts the Gram toward the mean: see methods/adasvd.py.
    """

    num_buckets: int
    scope: ClassVar[Scope] = "site"
    sequential: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Unique and stable."""
        return f"stacked_gram_{self.num_buckets}"

    def start(self, precision: Precision, num_samples: int) -> Accumulator:
        """Fresh accumulator."""
        return _BucketMeans(_GramSum(precision), math.ceil(num_samples / self.num_buckets))


@dataclass(frozen=True)
class AbsMean:
    """(n,): mean_t |x_t| (ASVD Sec. 3.2)."""

    scope: ClassVar[Scope] = "site"
    sequential: ClassVar[bool] = False
    name: ClassVar[str] = "abs_mean"

    def start(self, precision: Precision, num_samples: int) -> Accumulator:
        """Fresh accumulator."""
        return _Mean(lambda x: x.flatten(0, -2).to(precision.sums).abs())


@dataclass(frozen=True)
class IOCosine:
    """(): mean_t cos(x_t, y_t) between a decoder layer's input and output (AdaSVD Eq. 17-18; 1 - it
    is ShortGPT's block influence).
    """

    scope: ClassVar[Scope] = "decoder_layer"
    sequential: ClassVar[bool] = False
    name: ClassVar[str] = "io_cosine"

    def start(self, precision: Precision, num_samples: int) -> Accumulator:
        """Fresh accumulator."""
        return _Mean(
            lambda x, y: torch.cosine_similarity(
                x.to(precision.sums), y.to(precision.sums), dim=-1
            ).flatten()
        )


@dataclass(frozen=True)
class Fisher:
    """(n,) or (m,): mean over sequences of the squared gradient of the language-model loss, summed
    over the other side (FWSVD).
    """

    side: Literal["in", "out"]
    scope: ClassVar[Scope] = "linear"
    sequential: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Unique and stable."""
        return f"fisher_{self.side}"

    def start(self, precision: Precision, num_samples: int) -> Accumulator:
        """Fresh accumulator."""
        # Squares of half-precision gradients underflow: always at least float32.
        return _Mean(
            lambda grad: (
                grad.float().square().sum(0 if self.side == "in" else 1)[None].to(precision.sums)
            )
        )


@dataclass(frozen=True)
class OutputGradGram:
    """(m, m): sum_t g_t g_t^T, g_t the gradient of a sequence's mean language-model loss by the
    linear's output at token t (K-FAC).
    """

    scope: ClassVar[Scope] = "output"
    side: ClassVar[str] = "out"
    sequential: ClassVar[bool] = False
    name: ClassVar[str] = "output_grad_gram"

    def start(self, precision: Precision, num_samples: int) -> Accumulator:
        """Fresh accumulator."""
        # Gradients spread over many orders of magnitude: never multiplied in less than float32.
        return _GramSum(
            Precision(precision.sums, torch.promote_types(precision.products, torch.float32))
        )


@dataclass(frozen=True)
class TokenWeightedGram:
    """(n, n) sum_t |g_t|^2 x_t x_t^T for side in, (m, m) sum_t |x_t|^2 g_t g_t^T for side out, of
    one linear.

    The Kronecker factors nearest to sum_t (x_t x_t^T) kron (g_t g_t^T) after one step from the
    identity (Van Loan, GFWSVD). Both have the trace sum_t |x_t|^2 |g_t|^2, which is also that of
    the sum.
    """

    side: Literal["in", "out"]
    scope: ClassVar[Scope] = "output"
    sequential: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Unique and stable."""
        return f"token_weighted_gram_{self.side}"

    def start(self, precision: Precision, num_samples: int) -> Accumulator:
        """Fresh accumulator."""
        sums = _GramSum(
            Precision(precision.sums, torch.promote_types(precision.products, torch.float32))
        )
        return _Weighted(sums, self.side)


class _Weighted:
    """Hands on one of (gradient, input), every token as often as the other is long."""

    def __init__(self, inner: "_GramSum", side: Literal["in", "out"]) -> None:
        self.inner, self.side = inner, side

    def update(self, *observation: Tensor) -> None:
        gradient, x = (
            tensor.flatten(0, -2).to(self.inner.precision.products) for tensor in observation
        )
        own, other = (x, gradient) if self.side == "in" else (gradient, x)
        self.inner.update(own * other.norm(dim=1, keepdim=True))

    def value(self) -> Tensor:
        return self.inner.value()

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        self.inner.merge(total)


class _Sum:
    """What every sum over tokens has in common."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.total: Tensor | None = None

    def value(self) -> Tensor:
        assert self.total is not None, "no data"
        return self.total

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        assert self.total is not None, "no data"
        self.total = total(self.total)


class _GramSum(_Sum):
    """x^T x with one triangle of blocks computed, the other mirrored at the end."""

    def update(self, *observation: Tensor) -> None:
        x = observation[0].flatten(0, -2).to(self.precision.products)
        n = x.shape[1]
        if self.total is None:
            self.total = torch.zeros(n, n, dtype=self.precision.sums, device=x.device)
        for tokens in x.split(_tokens_per_product(x)):
            for start in range(0, n, GRAM_BLOCK):
                stop = min(start + GRAM_BLOCK, n)
                self.total[start:stop, :stop] += _product(tokens[:, start:stop].T, tokens[:, :stop])

    def value(self) -> Tensor:
        lower = super().value().tril()
        return lower + lower.tril(-1).T


class _CrossSum(_Sum):
    """x^T x', all of it."""

    def update(self, *observation: Tensor) -> None:
        dense, own = (x.flatten(0, -2).to(self.precision.products) for x in observation)
        if self.total is None:
            self.total = torch.zeros(
                dense.shape[1], own.shape[1], dtype=self.precision.sums, device=own.device
            )
        size = _tokens_per_product(own)
        for left, right in zip(dense.split(size), own.split(size), strict=True):
            self.total += _product(left.T, right)


def _half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _tokens_per_product(x: Tensor) -> int:
    return PRODUCT_TOKENS if _half(x) and not x.is_cuda else len(x)


def _product(left: Tensor, right: Tensor) -> Tensor:
    # Only CUDA multiplies in half precision into a float32 result.
    return (
        torch.mm(left, right, out_dtype=torch.float32)
        if _half(left) and left.is_cuda
        else left @ right
    )


class _BucketMeans:
    """Averages consecutive samples, then hands each average on."""

    def __init__(self, inner: _GramSum, size: int) -> None:
        self.inner, self.size = inner, size
        self.sum: Tensor | None = None
        self.count = 0

    def update(self, *observation: Tensor) -> None:
        for sample in observation[0]:
            self.sum = sample.float() if self.sum is None else self.sum + sample.float()
            self.count += 1
            if self.count == self.size:
                self._flush()

    def _flush(self) -> None:
        if self.sum is not None:
            self.inner.update(self.sum / self.count)
        self.sum, self.count = None, 0

    def value(self) -> Tensor:
        self._flush()
        return self.inner.value()

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        raise TypeError(
            "Means of consecutive samples are no sum over the samples that several processes saw."
        )


class _Mean:
    """Mean over the first axis of what `reduce` makes of each observation."""

    def __init__(self, reduce: Callable[..., Tensor]) -> None:
        self.reduce = reduce
        self.sum: Tensor | None = None
        self.count = 0

    def update(self, *observation: Tensor) -> None:
        terms = self.reduce(*observation)
        total = terms.sum(0)
        self.sum = total if self.sum is None else self.sum + total
        self.count += len(terms)

    def value(self) -> Tensor:
        assert self.sum is not None, "no data"
        return self.sum / self.count

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        assert self.sum is not None, "no data"
        self.sum = total(self.sum)
        self.count = round(
            float(
                total(torch.tensor(float(self.count), dtype=torch.float64, device=self.sum.device))
            )
        )


class Stats(Mapping[Statistic, Tensor]):
    """The statistics of one linear: its site's, its own and its decoder layer's."""

    def __init__(self, values: Mapping[Statistic, Tensor]) -> None:
        self._values = dict(values)

    def __getitem__(self, statistic: Statistic) -> Tensor:
        return self._values[statistic]

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def part(self, outputs: Tensor | None, inputs: Tensor | None) -> "Stats":
        """Those of a linear that has only these of the outputs and inputs (indices); None: all."""
        return Stats({x: _part(x, value, outputs, inputs) for x, value in self.items()})

    def through(self, T: Tensor) -> "Stats":
        """Those of inputs that a matrix T (k n) makes of the linear's: of Gram matrices alone, and
        what is of the outputs.
        """
        found = {}
        for x, value in self.items():
            if x.scope in ("site", "pair") and value.ndim == 2:
                wide = T.to(value.dtype)
                found[x] = wide @ value @ wide.T
            elif x.scope == "output" and getattr(x, "side", "") == "out":
                found[x] = value
        return Stats(found)


def _part(
    statistic: Statistic, value: Tensor, outputs: Tensor | None, inputs: Tensor | None
) -> Tensor:
    if statistic.scope == "linear":
        value = value if outputs is None else value[outputs]
        return value if inputs is None else value[:, inputs]
    of_outputs = statistic.scope == "output" and getattr(statistic, "side", "out") == "out"
    kept = None if statistic.scope == "decoder_layer" else outputs if of_outputs else inputs
    if kept is None:
        return value
    return value[kept] if value.ndim == 1 else value[..., kept, :][..., kept]


def shapes(statistic: Statistic, m: int, n: int, tokens: int, hidden: int) -> list[tuple[int, ...]]:
    """Of the tensors that an accumulator of this statistic is fed with, for an m x n linear."""
    seen: dict[str, list[tuple[int, ...]]] = {
        "site": [(1, tokens, n)],
        "pair": [(1, tokens, n), (1, tokens, n)],
        "linear": [(m, n)],
        "output": [(1, tokens, m), (1, tokens, n)],
        "decoder_layer": [(1, tokens, hidden), (1, tokens, hidden)],
    }
    return seen[statistic.scope]


def example(statistic: Statistic, m: int, n: int) -> Tensor:
    """What it may look like, of a few made-up tokens: for who has to know the form of what is made
    of it.
    """
    accumulator = statistic.start(Precision(torch.float32, torch.float32), 1)
    tensors = [torch.arange(1.0, math.prod(x) + 1) for x in shapes(statistic, m, n, 2 * n, n)]
    made = zip(tensors, shapes(statistic, m, n, 2 * n, n), strict=True)
    accumulator.update(*(x.square().sin().reshape(shape) for x, shape in made))
    return accumulator.value()
