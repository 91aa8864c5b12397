"""A form on a grid of its own: what makes the grid of every unit a choice of the allocation.

Its predicted loss is of what will be stored. A form by itself predicts what leaving components or
dimensions out loses. What rounding adds is measured, in the same norm, on the very integers that
would be stored, at a few sizes of the form; between them it is smooth (methods.md 9.1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from specomp.forms.menu import Alike
from specomp.forms.options import read_off
from specomp.forms.prices import Part, bits
from specomp.forms.whole import Whole
from specomp.models.family import LinearSpec, Unit
from specomp.numerics.grid import GridSpec
from specomp.numerics.statistics import Stats
from specomp.slots import Chain, Evidence, Form, Rounded, Rounding, SizeOf

# Shares of the largest size at which rounding is measured.
MEASURED = (1 / 8, 1 / 4, 1 / 2, 1.0)
WHOLE = Whole()
VERSION = 1  # part of the cache key: raise it when rounding gives other numbers


class Rule(Rounding, Protocol):
    """A rounding that also rounds to several grids at once."""

    def each(
        self, rules: Sequence[Any], chain: Chain, stats: Stats, dtype: torch.dtype
    ) -> list[tuple[Rounded, ...]]:
        """By each of several rules that differ from this one in their grid alone."""


@dataclass(frozen=True)
class Trials:
    """What rounding loses of a form, by each of several rules that differ in their grid alone."""

    form: Form
    rules: tuple[Rule, ...]
    version: int = VERSION

    def losses(self, unit: Unit, sizes: Sequence[int], evidence: Evidence) -> dict[str, Tensor]:
        """The sizes, and what each rule loses at them (rules, sizes) in float64."""

        def make() -> dict[str, Tensor]:
            lost = [self.once(unit, size, evidence) for size in sizes]
            found = {"sizes": torch.tensor(sizes), "losses": torch.stack(lost, 1)}
            if self.form.size_of == "whole":
                all_of_it = [
                    evidence.norm(x).loss(evidence.weight(x).float()) for x in unit.linears
                ]
                found["nothing"] = torch.tensor(all_of_it, dtype=torch.float64).square().sum()
            return found

        return dict(evidence.remembered(unit, self, make, self.rules[0].needs))

    def once(self, unit: Unit, size: int, evidence: Evidence) -> Tensor:
        """(rules) in float64: at one size."""
        trial = Trial(evidence, self.rules)
        self.form.fit(unit, size, cast(Evidence, trial))
        return trial.squares


@dataclass(frozen=True)
class Gridded:
    """`form`, rounded by one of the rules that are tried on it."""

    trials: Trials
    index: int

    @property
    def size_of(self) -> SizeOf:
        """That of the form."""
        return self.form.size_of

    @property
    def form(self) -> Form:
        """What is rounded."""
        return self.trials.form

    @property
    def rounding(self) -> Rule:
        """By what."""
        return self.trials.rules[self.index]

    def sizes(self, unit: Unit) -> Sequence[int]:
        """Those of the form that are smaller than every linear in full on the same grid."""
        sizes = self.form.sizes(unit)
        if self.size_of == "whole" or not len(sizes):
            return sizes
        grid, dtype = self.rounding.grid, torch.float16  # all is on the grid, whatever the dtype
        found = torch.tensor(sizes)
        prices = torch.as_tensor(bits(self.form.parts(unit, found, grid), dtype))
        whole = bits(WHOLE.parts(unit, 0, grid), dtype)
        return cast(Sequence[int], found[prices.expand(len(found)) < whole].tolist())

    def parts(self, unit: Unit, size: int, grid: GridSpec | None = None) -> Mapping[str, Part]:
        """Those of the form, on its own grid."""
        return cast(Mapping[str, Part], self.form.parts(unit, size, self.rounding.grid))

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """What is left out, and what rounding the rest adds, (sizes) in float64; in full, what
        storing nothing would lose at size 0.
        """
        own = self.form.losses(unit, sizes, evidence)
        tried = self.tried(unit)
        if not tried or not len(sizes):
            return own
        found = self.trials.losses(unit, tried, evidence)
        lost = own + between(found["sizes"], found["losses"][self.index], sizes)
        return torch.where(sizes == 0, found["nothing"], lost) if "nothing" in found else lost

    def tried(self, unit: Unit) -> list[int]:
        """The sizes at which rounding is measured, the same on every grid."""
        sizes = self.form.sizes(unit)
        count = len(sizes)
        if not count:
            return []
        if self.size_of == "whole":
            return [sizes[-1]]
        numbers = torch.as_tensor(
            bits(self.form.parts(unit, torch.tensor(sizes)), torch.float16)  # type: ignore[arg-type]
        ).expand(count)
        count = int((numbers <= bits(WHOLE.parts(unit, 0), torch.float16)).sum()) or 1
        return [sizes[i] for i in sorted({max(0, math.ceil(x * count) - 1) for x in MEASURED})]

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> Mapping[str, nn.Module]:
        """What the form makes."""
        return self.form.fit(unit, size, evidence.on(self.rounding))

    def kept(self, unit: Unit) -> int:
        """Sizes and losses where rounding was measured, in 8 bytes; said by the first of the grids.
        What its form keeps it says itself, as the form without a grid.
        """
        count = len(self.tried(unit))
        numbers = count * (1 + len(self.trials.rules)) + (self.size_of == "whole")
        return 0 if self.index else 8 * numbers

    def facts(self, module: nn.Module) -> Mapping[str, float]:
        """Those of the form, and the bits of its integers."""
        grid = self.rounding.grid
        assert grid is not None, "a grid of its own"
        return {**self.form.facts(module), "bits": float(grid.bits)}

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> Sequence[str]:
        """Those of the form, on this grid."""
        grid = self.rounding.grid
        assert grid is not None, "a grid of its own"
        return [f"{grid.bits} bits: {note}" for note in self.form.notes(facts, count)]


class Trial:
    """Evidence for making a form that nothing installs: adds up what each rule loses of it."""

    def __init__(self, evidence: Evidence, rules: Sequence[Rule]) -> None:
        self.evidence, self.rules = evidence, rules
        self.squares = torch.zeros(len(rules), dtype=torch.float64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.evidence, name)

    def lost(self, linear: LinearSpec, share: float) -> None:
        """Not reported."""

    def rounded(self, linear: LinearSpec, chain: Chain) -> tuple[Rounded, ...]:
        """As they are, after every rule had its turn."""
        turn = Turn(self.rules)
        same = self.evidence.on(cast(Rounding, turn)).rounded(linear, chain)
        before = chain.assemble(*(x.float() for x in chain.matrices))
        norm = self.evidence.norm(linear)
        for index, found in enumerate(turn.found):
            after = chain.assemble(*(x.values for x in found))
            self.squares[index] += norm.loss(after - before) ** 2
        return same


class Turn:
    """A rounding that keeps what each of several rules makes of its matrices."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules, self.found = rules, list[tuple[Rounded, ...]]()
        self.needs = rules[0].needs

    def __call__(self, chain: Chain, stats: Stats, dtype: torch.dtype) -> tuple[Rounded, ...]:
        """The matrices as they are."""
        self.found = self.rules[0].each(self.rules, chain, stats, dtype)
        return tuple(map(Rounded, chain.matrices))


def on_grids(form: Form, rules: Sequence[Rule]) -> list[Form]:
    """The form on the grid of each of several rules; of several units at one size, each of them."""
    if not rules:
        return []
    if isinstance(form, Alike):
        return [cast(Form, Alike(x, form.units)) for x in on_grids(form.form, rules)]
    trials = Trials(form, tuple(rules))
    return [cast(Form, Gridded(trials, index)) for index in range(len(rules))]


def between(at: Tensor, values: Tensor, sizes: Tensor) -> Tensor:
    """values (points) at ascending sizes `at`, read at others, in float64: straight lines over the
    logarithm of the size, level outside.
    """
    return read_off(at.double().log(), values, sizes.double().clamp_min(1).log())
