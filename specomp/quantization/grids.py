"""Several grids, of which an allocation chooses one for every unit: rank and bits under one budget.

Candidates (methods.md 9.2; OURS): every linear in full on each grid of `whole`; as two factors on
each of `factors`; in the method's own packing, where that is another, on each of `packing`; units
of several linears on each of `units`. What a method stores without a grid stays a candidate too.
Every one is priced in all that it stores, and predicted as it would be stored (forms/gridded.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field, SkipValidation

from specomp.forms.factors import Factors
from specomp.forms.gridded import WHOLE, on_grids
from specomp.numerics.grid import GridSpec
from specomp.numerics.statistics import Statistic, Stats
from specomp.quantization.factors import FactorQuantizer
from specomp.settings import configurable
from specomp.slots import Chain, Form, Rounded

Kind = tuple[Annotated[int, Field(ge=2, le=8)], Annotated[int, Field(ge=8)] | None]
"""Bits and group size; None: a whole row."""


@configurable
class Grids:
    """Every setting is explained in conf/quantizer/grids.yaml."""

    # how numbers get onto a grid; its own bits and group size are not used
    rule: SkipValidation[FactorQuantizer]
    whole: Annotated[tuple[Kind, ...], Field(min_length=1)]
    factors: tuple[Kind, ...]
    packing: tuple[Kind, ...]
    units: tuple[Kind, ...]
    grid: ClassVar[None] = None

    @property
    def grids(self) -> Sequence[GridSpec]:
        """All of them."""
        kinds = dict.fromkeys((*self.whole, *self.factors, *self.packing, *self.units))
        return [x.grid for x in self._by(list(kinds))]

    @property
    def needs(self) -> frozenset[Statistic]:
        """Those of the rule."""
        return self.rule.needs

    def _by(self, kinds: Sequence[Kind]) -> list[FactorQuantizer]:
        return [replace(self.rule, bits=bits, group_size=size) for bits, size in kinds]

    def single(self, packing: Form) -> Sequence[Form]:
        """In full, as two factors, in the method's own packing; and that without a grid."""
        full = on_grids(WHOLE, self._by(self.whole))
        if packing.size_of == "whole":
            return full
        two = Factors()
        low = on_grids(two, self._by(self.factors))
        own = on_grids(packing, self._by(self.packing)) if packing != two else []
        return [*full, *low, *own, packing]

    def wide(self, forms: Sequence[Form]) -> Sequence[Form]:
        """Each on every grid of `units`, and without."""
        return [*(x for form in forms for x in on_grids(form, self._by(self.units))), *forms]

    def __call__(self, chain: Chain, stats: Stats, dtype: torch.dtype) -> tuple[Rounded, ...]:
        """As they are: what is on a grid says so itself."""
        return tuple(map(Rounded, chain.matrices))

    def notes(self, damping: Sequence[float]) -> list[str]:
        """Those of the rule."""
        return self.rule.notes(damping)
