"""What a unit costs: the list of tensors that are stored for it, and the two ways to count them.

numbers  what the papers count: parameters, no indices, a weight on a grid as one in full precision
bits     everything: values on their grids, scales, zeros, indices

A plan, an allocation and the ledger of a finished model call these two and nothing else. Sizes may
be tensors (ranks of many candidates, or of many linears): then so are the prices.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Protocol

import torch
from pydantic import Field
from torch import nn

from specomp.models.modules import CodedLinear, GridLinear
from specomp.numerics.grid import SCALE_BYTES, CodeSpec, GridSpec
from specomp.numerics.ratio import retained
from specomp.settings import configurable


@dataclass(frozen=True)
class Part:
    """One stored tensor: of numbers, on a grid where there is one; or, with index_bits, of indices
    of that many bits.
    """

    shape: tuple[int, ...]
    grid: GridSpec | None = None
    index_bits: int = 0


Parts = Mapping[str, Part]


def numbers(parts: Parts) -> int:
    """Parameters."""
    return sum(math.prod(x.shape) for x in parts.values() if not x.index_bits)


def bits(parts: Parts, dtype: torch.dtype) -> int:
    """Stored bits, where what is on no grid is stored in this dtype."""
    return sum(_bits(x, dtype) for x in parts.values())


def held(parts: Parts, dtype: torch.dtype) -> int:
    """Bits in memory while a model of this dtype is used: the values of simulated grids."""
    found = 0
    for part in parts.values():
        grid = part.grid
        if grid is None or not grid.simulated:
            found += _bits(part, dtype)
        else:
            found += _bits(replace(part, grid=None), dtype)
            found += 8 * SCALE_BYTES * part.shape[1] * grid.scaled
    return found


def _bits(part: Part, dtype: torch.dtype) -> int:
    if part.grid is not None:
        return 8 * part.grid.num_bytes(*part.shape)
    return math.prod(part.shape) * (part.index_bits or 8 * dtype.itemsize)


def parts_of(module: nn.Module) -> dict[str, Part]:
    """What a finished module stores: its weights on their grids, and its buffers as indices. Biases
    are no weights.
    """
    found = {}
    coded = {name: x for name, x in module.named_modules() if isinstance(x, CodedLinear)}
    for name, x in coded.items():
        spec = CodeSpec(bits=4, group_size=x.block_size, symmetric=True)
        found[f"{name}.weight".lstrip(".")] = Part((x.out_features, x.in_features), spec)
    for owner_name, owner in module.named_modules():
        for name, value in owner.named_parameters(owner_name, recurse=False):
            if name.rpartition(".")[2] != "bias":
                grid = owner.grid.spec if isinstance(owner, GridLinear) else None
                found[name] = Part(tuple(value.shape), grid)
    stored = module.state_dict().keys()
    for name, value in module.named_buffers():
        if name in stored and name.rpartition(".")[0] not in coded:
            found[name] = Part(tuple(value.shape), index_bits=8 * value.element_size())
    return found


class Budget(Protocol):
    """How much may be stored, in which currency (parameters, bits); setting and remedy: words for a
    message.
    """

    @property
    def currency(self) -> str:
        """What is counted."""

    @property
    def counts_bits(self) -> bool:
        """Whether a grid changes a price."""

    @property
    def quantizer(self) -> str:
        """The choice of conf/quantizer that it is spent with where none is named."""

    @property
    def remedy(self) -> str:
        """What to change where it does not suffice."""

    @property
    def setting(self) -> str:
        """As it is typed."""

    @property
    def held_out(self) -> int:
        """Samples of the calibration set that it is measured on, and nothing else reads; 0: it is
        counted.
        """

    @property
    def tries(self) -> int:
        """How often a model is stored at most until it is met."""

    @property
    def most(self) -> float:
        """Of what is measured, the most that is allowed."""

    def price(self, parts: Parts, dtype: torch.dtype) -> int:
        """Of parts, in this currency."""

    def share(self, dtype: torch.dtype) -> float:
        """What may be spent, as a share of the price of the dense units of a model of this
        dtype.
        """

    def identity(self) -> dict[str, float]:
        """What a record's key says of it."""

    def ledger(self, dense_bits: float) -> dict[str, float]:
        """The target as a ledger states it; dense_bits: a weight of the dense model."""


class Counted:
    """What is met by counting: nothing is held out, stored once."""

    held_out: ClassVar[int] = 0
    tries: ClassVar[int] = 1
    most: ClassVar[float] = math.inf


class InBits:
    """What is spent in stored bits, on grids."""

    currency: ClassVar[str] = "bits"
    counts_bits: ClassVar[bool] = True
    quantizer: ClassVar[str] = "grids"

    def price(self, parts: Parts, dtype: torch.dtype) -> int:
        """Stored bits."""
        return bits(parts, dtype)


@configurable
class Numbers(Counted):
    """A budget of parameters: the papers' ratio. Papers quote compression, the mathematics uses
    retention.
    """

    compression: Annotated[float, Field(ge=0, lt=1)]
    currency: ClassVar[str] = "parameters"
    counts_bits: ClassVar[bool] = False
    quantizer: ClassVar[str] = "none"
    remedy: ClassVar[str] = "lower ratio.compression"

    @property
    def setting(self) -> str:
        """As it is typed."""
        return f"ratio.compression={self.compression:.6g}"

    @property
    def retention(self) -> float:
        """Fraction of parameters kept (AdaSVD's trr)."""
        return retained(self.compression)

    def price(self, parts: Parts, dtype: torch.dtype) -> int:
        """Parameters."""
        return numbers(parts)

    def share(self, dtype: torch.dtype) -> float:
        """The retention."""
        return self.retention

    def identity(self) -> dict[str, float]:
        """The compression."""
        return {"compression": self.compression}

    def ledger(self, dense_bits: float) -> dict[str, float]:
        """Retention and compression."""
        return {"target_retention": self.retention, "target_compression": self.compression}

    def __str__(self) -> str:
        return f"compression {self.compression:.0%}"


@configurable
class Bits(Counted, InBits):
    """A budget of stored bits a weight of the units, everything counted."""

    bits: Annotated[float, Field(gt=0)]
    remedy: ClassVar[str] = "raise ratio.bits, or use a quantizer of fewer bits"

    @property
    def setting(self) -> str:
        """As it is typed."""
        return f"ratio.bits={self.bits:.6g}"

    def share(self, dtype: torch.dtype) -> float:
        """Bits a weight over those of the dense model; at most all of it."""
        return min(1.0, self.bits / (8 * dtype.itemsize))

    def identity(self) -> dict[str, float]:
        """Bits a weight."""
        return {"bits": self.bits}

    def ledger(self, dense_bits: float) -> dict[str, float]:
        """Bits a weight, and their share of the dense model's."""
        return {"target_retention": min(1.0, self.bits / dense_bits), "target_bits": self.bits}

    def __str__(self) -> str:
        return f"{self.bits:g} bits a weight"


@configurable
class Divergence(InBits):
    """A budget by quality: the fewest stored bits at which the KL to the dense model, measured on
    held-out samples, stays below. Every setting is explained in conf/ratio/kl.yaml.
    """

    kl: Annotated[float, Field(gt=0)]
    # as in the yaml: it is typed in notebooks too
    held_out: Annotated[int, Field(ge=1)] = 8
    tries: Annotated[int, Field(ge=2)] = 6
    start: Annotated[float, Field(gt=0)] = 4.0
    remedy: ClassVar[str] = "raise ratio.start, or use a quantizer of fewer bits"

    @property
    def setting(self) -> str:
        """As it is typed."""
        return f"ratio.kl={self.kl:.6g}"

    @property
    def most(self) -> float:
        """The KL, in nats a token."""
        return self.kl

    def share(self, dtype: torch.dtype) -> float:
        """What a search begins with, and a plan assumes."""
        return Bits(bits=self.start).share(dtype)

    def identity(self) -> dict[str, float]:
        """What was asked for and measured on; where a search begins moves its end a little too."""
        return {
            "kl": self.kl,
            "held_out": self.held_out,
            "tries": self.tries,
            "start": self.start,
        }

    def ledger(self, dense_bits: float) -> dict[str, float]:
        """Where the search begins: the bits that it ends with are the ledger's."""
        return Bits(bits=self.start).ledger(dense_bits)

    def __str__(self) -> str:
        return f"KL {self.kl:g}"
