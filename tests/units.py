"""Units without a model: what an allocation chooses among, and what a form is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from specomp.forms.factors import Factors
from specomp.forms.menu import options
from specomp.forms.options import Options
from specomp.forms.prices import Budget, Numbers
from specomp.models.family import LinearSpec, Unit
from specomp.numerics.factors import LowRankFactors, Spectrum
from specomp.numerics.grid import GridSpec
from specomp.numerics.statistics import Stats
from specomp.quantization.none import NoQuantizer
from specomp.slots import Chain, Choice, Form, Rounded, Rounding


def unit(name: str, m: int, n: int, *, decoder_layer: int = 0, kind: str = "q") -> Unit:
    """One m x n linear."""
    return Unit(name, "linear", (LinearSpec(name, m, n, decoder_layer, 0, kind),))


@dataclass
class Known:
    """Evidence of what is given, and of nothing else.

    values: singular values by linear; pair: the factors of every linear.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    pair: LowRankFactors | None = None
    own_bias: Tensor | None = None
    rounding: Rounding = field(default_factory=NoQuantizer)
    seen: Stats = field(default_factory=lambda: Stats({}))
    dtype: torch.dtype = torch.float32

    def spectrum(self, linear: LinearSpec) -> Spectrum:
        return Spectrum(torch.empty(0, 0), self.values[linear.name], torch.empty(0, 0))

    def singular_values(self, linear: LinearSpec) -> Tensor:
        return self.values[linear.name]

    def factors(self, linear: LinearSpec, rank: int) -> LowRankFactors:
        assert self.pair is not None, "no factors were asked for"
        return LowRankFactors(self.pair.U[:, :rank], self.pair.Vt[:rank])

    def rounded(self, linear: LinearSpec, chain: Chain) -> tuple[Rounded, ...]:
        whole = chain.assemble(*(x.double() for x in chain.matrices))
        assert whole.shape == (linear.m, linear.n)
        return self.rounding(chain, self.seen, self.dtype)

    def bias(self, linear: LinearSpec) -> Tensor | None:
        return self.own_bias

    def dense(self, linear: LinearSpec) -> nn.Module:
        return nn.Linear(linear.n, linear.m, bias=False, dtype=self.dtype)

    def place(self, linear: LinearSpec) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": "cpu"}


class Refuse:
    """Reads of an allocation that needs none."""

    def stats(self, linear: LinearSpec) -> Stats:
        raise AssertionError("not needed by this allocation")

    def probe(self, unit: Unit | None, choice: Choice | None) -> float:
        raise AssertionError("not needed by this allocation")


def menu(
    units: Sequence[Unit],
    *,
    form: Form | None = None,
    values: Mapping[str, Tensor] | None = None,
    budget: Budget | None = None,
    grid: GridSpec | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[Unit, Options]:
    """The options of units, priced in parameters of two factors unless something else is said."""
    budget = budget or Numbers(compression=0.0)
    return options(units, [form or Factors()], budget, dtype, Known(values or {}), grid)


def sizes(choices: Mapping[Unit, Choice]) -> dict[str, int]:
    """Ranks by name; a dense unit has that of a full matrix."""
    return {x.name: choice.size for x, choice in choices.items()}
