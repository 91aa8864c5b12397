"""The menu of a model: the options of every unit, of one linear or of several.

A functional unit (an MLP, the values of attention) may be stored as one, or its linears by
themselves; both ways are options of one unit, so an allocation chooses among them by price and
predicted loss alone. What stands for several units at once is split up when the choice is made.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from specomp.forms.options import DENSE, Options, steps
from specomp.forms.prices import Budget, Parts
from specomp.models.family import Unit
from specomp.numerics.grid import GridSpec
from specomp.progress import track
from specomp.slots import Choice, Evidence, Form, SizeOf


def options(
    units: Sequence[Unit],
    forms: Sequence[Form],
    budget: Budget,
    dtype: torch.dtype,
    evidence: Evidence,
    grid: GridSpec | None,
    wide: Mapping[Unit, Sequence[Form]] | None = None,
    *,
    comparable: bool = False,
    predicted: bool = True,
    each: Callable[[Callable[[Unit], Options], Sequence[Unit]], Iterable[Options]] = map,
) -> dict[Unit, Options]:
    """The options of every unit of a model of this dtype. units: of one linear each; wide: the
    forms of those of several, which take the place of their linears; comparable: see Wide.
    predicted: whether losses may be asked for, which decide among several forms of a linear.
    each: a `map`, where their losses can be predicted side by side.
    """
    wide = wide or {}
    several = len(forms) > 1 and predicted
    joined = {x.name for unit in wide for x in unit.linears}
    # whose losses decide what an option is; the others are asked for theirs, if at all, later
    deciding = [*wide, *(x for x in units if several or x.linears[0].name in joined)]
    across = [x for x in wide if x.linears[-1].decoder_layer != x.decoder_layer]
    within = sorted((x for x in deciding if x not in across), key=lambda x: x.decoder_layer)

    def made_of(unit: Unit) -> Options:
        if several and unit not in wide:
            return Best(unit, forms, budget, dtype, evidence, grid)
        return Options(unit, wide.get(unit, forms), budget, dtype, evidence, grid).predicted()

    # the first time each takes a decomposition, or trials of every grid
    label = "try grids" if several else "predict losses of whole MLPs"
    asked: Iterable[Options] = chain(each(made_of, within), map(made_of, across))
    asked = track(asked, label, len(deciding)) if deciding else ()
    made = dict(zip([*within, *across], asked, strict=True))
    for unit in units:
        if unit not in made:
            made[unit] = Options(unit, forms, budget, dtype, evidence, grid)
    of_linear = {unit.linears[0].name: unit for unit in units}
    for unit in wide:
        linears = [made.pop(of_linear[x.name]) for x in unit.linears]
        made[unit] = Wide(made[unit], linears, comparable=comparable)
    place = {unit.linears[0].name: i for i, unit in enumerate(units)}
    return dict(sorted(made.items(), key=lambda item: place[item[0].linears[0].name]))


def settled(choices: Mapping[Unit, Choice]) -> dict[Unit, Choice]:
    """Choices with linears by themselves where a unit is not stored as one."""
    found: dict[Unit, Choice] = {}
    for unit, choice in choices.items():
        if isinstance(choice.form, Joint):
            found |= choice.form.split(unit, choice.size)
        elif choice.form == DENSE:
            for x in unit.linears:
                single = Unit(x.name, "linear", (x,))
                found[single] = Choice(DENSE, DENSE.sizes(single)[0])
        else:
            found[unit] = choice
    return found


class Best(Options):
    """Of a linear that may be stored in several forms, the options that lose less than every
    cheaper one: then the dearest that is affordable is the best.
    """

    def __init__(
        self,
        unit: Unit,
        forms: Sequence[Form],
        budget: Budget,
        dtype: torch.dtype,
        evidence: Evidence,
        grid: GridSpec | None,
    ) -> None:
        super().__init__(unit, forms, budget, dtype, evidence, grid)
        self._keep(super().losses)

    def _keep(self, losses: Tensor) -> None:
        kept = frontier(self.prices, losses)
        self._owner, self.sizes = self._owner[kept], self.sizes[kept]
        self.prices, self._found = self.prices[kept], losses[kept]

    @property
    def losses(self) -> Tensor:  # type: ignore[override]
        """Predicted losses (options) in float64."""
        return self._found

    @property
    def whole(self) -> float:  # type: ignore[override]
        """What storing nothing would lose: size 0 of a form of components, where there is one."""
        ranked = [x for x in self.forms if x.size_of == "rank"]
        nothing = torch.zeros(1, dtype=torch.int64)
        return float([*self.forms[:1], *ranked][-1].losses(self.unit, nothing, self.evidence))

    def multiples(self, of: int) -> Options:
        """The same of sizes that are multiples of this, and all in full."""
        if of == 1:
            return self
        full = torch.tensor([x.size_of == "whole" for x in self.forms])[self._owner]
        kept = (full | (self.sizes % of == 0)).nonzero().flatten()
        made = copy.copy(self)
        made._owner, made.sizes = self._owner[kept], self.sizes[kept]
        made.prices, made._found = self.prices[kept], self._found[kept]
        return made


class Wide(Options):
    """The options of a unit of several linears: its own forms, and its linears by themselves at
    the best split of every price. Of options that cost as much or more and lose as much or more
    than another there is none, so the dearest that is affordable is the best.
    """

    def __init__(
        self, own: Options, linears: Sequence[Options], *, comparable: bool, multiple: int = 1
    ) -> None:
        """own: of its own forms; linears: the options of each, in the order of the unit;
        comparable: whether all losses are of the model's loss. If not, shares of energy are: of
        what the unit's last linear puts out, of which each linear's error takes its own share
        (CHOICE). multiple: of which the sizes of its own forms are.
        """
        vars(self).update(vars(own))
        self._made_of = own, linears, comparable
        unit, forms, losses = own.unit, own.forms[:-1], own.losses
        alike = next((x for x in forms if isinstance(x, Alike)), None)
        last = {unit.linears[-1]} if alike is None else {x.linears[-1] for x in alike.units}
        whole = sum(x.whole for x in linears if x.unit.linears[0] in last)
        self._whole = sum(x.whole for x in linears) if comparable else whole
        mine = (self.sizes % multiple == 0).nonzero().flatten()
        mine = torch.cat([mine[mine < self.last], torch.tensor([self.last])])
        count, prices, losses = len(mine) - 1, self.prices[mine], losses[mine]
        owner, sizes = self._owner[mine].tolist(), self.sizes[mine].tolist()
        if alike is None:
            scales = [1.0 if comparable else whole / x.whole if x.whole else 0.0 for x in linears]
            apart = Apart.of(linears, scales)
            splits = len(apart.prices)
            self.forms = (*forms, apart, DENSE)
            prices = torch.cat([prices[:count], apart.prices, prices[count:]])
            losses = torch.cat([losses[:count], apart.losses_at, losses[count:]])
            owner = [*owner[:count], *[len(forms)] * splits, len(forms) + 1]
            sizes = [*sizes[:count], *range(splits), sizes[count]]
        kept = frontier(prices, losses)
        self._owner, self.sizes = torch.tensor(owner)[kept], torch.tensor(sizes)[kept]
        self.prices, self._found = prices[kept], losses[kept]

    @property
    def losses(self) -> Tensor:  # type: ignore[override]
        """Predicted losses (options) in float64."""
        return self._found

    @property
    def whole(self) -> float:  # type: ignore[override]
        """What storing nothing would lose."""
        return self._whole

    def multiples(self, of: int) -> Options:
        """The same of ranks and sizes that are multiples of this."""
        if of == 1:
            return self
        own, linears, comparable = self._made_of
        few = [x.multiples(of) for x in linears]
        return Wide(own, few, comparable=comparable, multiple=of)


class Joint(ABC):
    """A form of several units, each of which is stored in a form of its own."""

    size_of: ClassVar[SizeOf] = "dimensions"

    @abstractmethod
    def split(self, unit: Unit, size: int) -> dict[Unit, Choice]:
        """What each of them is stored as."""

    def parts(self, unit: Unit, size: int, grid: GridSpec | None = None) -> Parts:
        """Those of all."""
        return {
            f"{x.name}.{name}": part
            for x, choice in self.split(unit, size).items()
            for name, part in choice.form.parts(x, choice.size, grid).items()
        }

    def fit(self, unit: Unit, size: int, evidence: Evidence) -> dict[str, nn.Module]:
        """What each one's form makes."""
        return {
            name: module
            for x, choice in self.split(unit, size).items()
            for name, module in choice.form.fit(x, choice.size, evidence).items()
        }

    def kept(self, unit: Unit) -> int:
        """That of the forms of each."""
        return 0

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Said by the forms of each."""
        return {}

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
        """Said by the forms of each."""
        return []


@dataclass(frozen=True, eq=False)
class Alike(Joint):
    """Several units in one form at one and the same size."""

    form: Form
    units: Sequence[Unit]

    def split(self, unit: Unit, size: int) -> dict[Unit, Choice]:
        """All at this size."""
        return {x: Choice(self.form, size) for x in self.units}

    def kept(self, unit: Unit) -> int:
        """Of all of them."""
        return sum(map(self.form.kept, self.units))

    def sizes(self, unit: Unit) -> Sequence[int]:
        """Those of the first: they are alike."""
        return self.form.sizes(self.units[0])

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """The sum of all."""
        found = [self.form.losses(x, sizes, evidence) for x in self.units]
        return torch.stack(found).sum(0)


@dataclass(frozen=True, eq=False)
class Apart(Joint):
    """The linears of a unit by themselves, as a form of it: size i is the i-th best split, from the
    cheapest of each to all dense.
    """

    linears: Sequence[Options]
    at: Tensor  # (splits, linears): the option of each
    prices: Tensor  # (splits)
    losses_at: Tensor  # (splits)

    @classmethod
    def of(cls, linears: Sequence[Options], scales: Sequence[float]) -> "Apart":
        """Along the hulls of all of them, the steepest step first; scales: of the losses of
        each.
        """
        losses = [x.losses * scale for x, scale in zip(linears, scales, strict=True)]
        at = [0] * len(linears)
        splits = [list(at)]
        for _, _, index, stop in steps(
            {i: (x.prices, y) for i, (x, y) in enumerate(zip(linears, losses, strict=True))}
        ):
            at[index] = stop
            splits.append(list(at))
        found = torch.tensor(splits)
        prices = torch.stack([x.prices[found[:, i]] for i, x in enumerate(linears)])
        lost = torch.stack([x[found[:, i]] for i, x in enumerate(losses)])
        return cls(linears, found, prices.sum(0), lost.sum(0))

    def split(self, unit: Unit, size: int) -> dict[Unit, Choice]:
        """What each linear is stored as."""
        return {
            x.unit: x.choice(index)
            for x, index in zip(self.linears, self.at[size].tolist(), strict=True)
        }

    def sizes(self, unit: Unit) -> range:
        """Splits."""
        return range(len(self.at))

    def losses(self, unit: Unit, sizes: Tensor, evidence: Evidence) -> Tensor:
        """(sizes)."""
        return self.losses_at[sizes]


def frontier(prices: Tensor, losses: Tensor) -> Tensor:
    """Indices of the options that lose less than every cheaper one, the cheapest first; the last
    one given, dense, stays.
    """
    last = len(prices) - 1
    order = losses[:last].argsort(stable=True)
    order = order[prices[order].argsort(stable=True)]  # by price, then by loss
    least = losses[order].cummin(0).values
    before = torch.cat([least.new_full((1,), math.inf), least])[:-1]
    kept = order[(losses[order] < before) & (prices[order] < prices[last])]
    return torch.cat([kept, torch.tensor([last])])
