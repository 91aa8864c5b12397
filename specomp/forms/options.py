"""What an allocation chooses among: every way to store a unit, with its price and its predicted
loss.

And what allocations share: turning wished-for retentions into options that meet a budget. A
retention is a share of what the dense unit costs in the budget's currency.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from specomp.errors import UserError
from specomp.forms.dense import Dense
from specomp.forms.prices import Budget, Parts
from specomp.models.family import Unit
from specomp.numerics.grid import GridSpec
from specomp.progress import track
from specomp.slots import Choice, Evidence, Form

K = TypeVar("K", bound=Hashable)

BISECTIONS = 60
# of a mean over units, relative; and of a price: 0.2 of 10,000 is 2,000 although 1 - 0.8 is no
# fifth in binary
ROUNDING = 1e-9
DENSE = Dense()


@dataclass(frozen=True)
class Option:
    """One way to store a unit: its price in the budget's currency, and the loss that is predicted
    for it.
    """

    choice: Choice
    price: float
    loss: float


class Options(Sequence[Option]):
    """The options of one unit, the cheapest first; dense is the last, whatever costs as much is
    left out.
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
        """dtype: of the model; grid: what the method rounds to."""

        def price(parts: Parts) -> int:
            return budget.price(parts, dtype)

        self.unit, self.budget, self.evidence = unit, budget, evidence
        self.forms = (*forms, DENSE)
        self.dense = float(price(DENSE.parts(unit, 0)))
        self._sizes = [torch.tensor(form.sizes(unit), dtype=torch.int64) for form in forms]
        prices = [
            torch.as_tensor(price(f.parts(unit, x, grid))).double().expand(len(x))
            for f, x in zip(forms, self._sizes, strict=True)
        ]
        owners = [torch.full_like(x, i) for i, x in enumerate(self._sizes)]
        self._sizes.append(torch.tensor(DENSE.sizes(unit)))
        flat = torch.cat([*prices, torch.tensor([self.dense], dtype=torch.float64)])
        order = flat[:-1].argsort(stable=True)
        self._order = torch.cat([order[flat[order] < self.dense], torch.tensor([len(order)])])
        self._owner = torch.cat([*owners, torch.tensor([len(forms)])])[self._order]
        self.prices = flat[self._order]
        self.sizes = torch.cat(self._sizes)[self._order]

    def choice(self, index: int) -> Choice:
        """The form and size at an index."""
        return Choice(self.forms[int(self._owner[index])], int(self.sizes[index]))

    @cached_property
    def losses(self) -> Tensor:
        """Predicted losses (options) in float64; asks for spectra."""
        found = [
            form.losses(self.unit, x, self.evidence)
            for form, x in zip(self.forms, self._sizes, strict=True)
        ]
        return torch.cat(found)[self._order]

    def multiples(self, of: int) -> "Options":
        """Those whose sizes are multiples of this, and dense; all where none is."""
        kept = (self.sizes % of == 0).nonzero().flatten()
        kept = kept[kept < self.last]
        if of == 1 or not len(kept):
            return self
        kept = torch.cat([kept, torch.tensor([self.last])])
        made = copy.copy(self)
        vars(made).pop("losses", None)
        made._order, made._owner = self._order[kept], self._owner[kept]
        made.prices, made.sizes = self.prices[kept], self.sizes[kept]
        return made

    @cached_property
    def whole(self) -> float:
        """What storing nothing would lose: size 0 of the first form."""
        return float(
            self.forms[0].losses(self.unit, torch.zeros(1, dtype=torch.int64), self.evidence)
        )

    def __len__(self) -> int:
        return len(self.prices)

    def __getitem__(self, index: int) -> Option:  # type: ignore[override]
        return Option(self.choice(index), float(self.prices[index]), float(self.losses[index]))

    @property
    def last(self) -> int:
        """Index of dense."""
        return len(self.prices) - 1

    def affordable(self, retention: float) -> int:
        """Index of the dearest option that costs at most this share of the dense one; -1 where none
        does.

        For two factors that is rank floor(retention m n / (m + n)): AdaSVD Eq. 21, and SVD-LLM's
        code.
        """
        if retention >= 1:
            return self.last
        paid = retention * self.dense * (1 + ROUNDING)
        return int(torch.searchsorted(self.prices, paid, right=True)) - 1


class Wide(Options):
    """The options of a unit of several linears: its own forms, and its linears by themselves at
    the best split of every price. Of options that cost as much or more and lose as much or more
    than another there is none, so the dearest that is affordable is the best.
    """

    def __init__(
        self,
        unit: Unit,
        forms: Sequence[Form],
        linears: Sequence[Options],
        dtype: torch.dtype,
        grid: GridSpec | None,
        *,
        comparable: bool,
        multiple: int = 1,
    ) -> None:
        """linears: the options of each, in the order of the unit; comparable: whether all losses
        are of the model's loss. If not, shares of energy are: of what the unit's last linear puts
        out, of which each linear's error takes its own share (CHOICE). multiple: of which the sizes
        of its own forms are.
        """
        super().__init__(unit, forms, linears[0].budget, dtype, linears[0].evidence, grid)
        self._made_of = forms, linears, dtype, grid, comparable
        losses = super().losses
        alike = next((x for x in forms if isinstance(x, Alike)), None)
        last = {unit.linears[-1]} if alike is None else {x.linears[-1] for x in alike.units}
        whole = sum(x.whole for x in linears if x.unit.linears[0] in last)
        self._whole = sum(x.whole for x in linears) if comparable else whole
        mine = (self.sizes % multiple == 0).nonzero().flatten()
        mine = torch.cat([mine[mine < self.last], torch.tensor([self.last])])
        own, prices, losses = len(mine) - 1, self.prices[mine], losses[mine]
        owner, sizes = self._owner[mine].tolist(), self.sizes[mine].tolist()
        if alike is None:
            scales = [1.0 if comparable else whole / x.whole if x.whole else 0.0 for x in linears]
            apart = Apart.of(linears, scales)
            count = len(apart.prices)
            self.forms = (*forms, apart, DENSE)
            prices = torch.cat([prices[:own], apart.prices, prices[own:]])
            losses = torch.cat([losses[:own], apart.losses_at, losses[own:]])
            owner = [*owner[:own], *[len(forms)] * count, len(forms) + 1]
            sizes = [*sizes[:own], *range(count), sizes[own]]
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
        forms, linears, dtype, grid, comparable = self._made_of
        few = [x.multiples(of) for x in linears]
        return Wide(self.unit, forms, few, dtype, grid, comparable=comparable, multiple=of)


class Joint(ABC):
    """A form of several units, each of which is stored in a form of its own."""

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
    order = sorted(range(last), key=lambda i: (float(prices[i]), float(losses[i])))
    kept, least = [], math.inf
    for i in order:
        if float(losses[i]) < least and float(prices[i]) < float(prices[last]):
            kept.append(i)
            least = float(losses[i])
    return torch.tensor([*kept, last])


def hull(prices: Tensor, losses: Tensor) -> list[int]:
    """Indices on the lower convex hull of losses over ascending prices, the first and the last
    among them.
    """
    kept: list[int] = []
    points = list(zip(prices.tolist(), losses.tolist(), strict=True))
    for index, (x, y) in enumerate(points):
        while len(kept) >= 2:
            (x0, y0), (x1, y1) = points[kept[-2]], points[kept[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            kept.pop()
        kept.append(index)
    return kept


def steps(
    curves: Mapping[K, tuple[Tensor, Tensor]],
) -> list[tuple[float, float, K, int]]:
    """(loss saved a unit of price, price, curve, index) of every step along the hulls, the
    steepest first: taken in this order they are the best there is at what they spend.
    """
    found = []
    for name, (prices, losses) in curves.items():
        points = hull(prices, losses)
        costs, lost = prices.tolist(), losses.tolist()
        for start, stop in zip(points, points[1:], strict=False):
            more = costs[stop] - costs[start]
            found.append(((lost[start] - lost[stop]) / more, more, name, stop))
    # Along a hull the rate falls, so sorting (which is stable) keeps the order of each one's steps.
    return sorted(found, key=lambda step: -step[0])


Menu = Mapping[Unit, Options]
"""Options by unit, in the order of the model; no linear is in two units."""


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
) -> dict[Unit, Options]:
    """The options of every unit of a model of this dtype. units: of one linear each; wide: the
    forms of those of several, which take the place of their linears; comparable: see Wide.
    """
    single = {unit: Options(unit, forms, budget, dtype, evidence, grid) for unit in units}
    by_linear = {unit.linears[0].name: found for unit, found in single.items()}
    made: dict[Unit, Options] = {}
    for unit, own in track_wide(wide or {}):
        linears = [by_linear.pop(x.name) for x in unit.linears]
        made[unit] = Wide(unit, own, linears, dtype, grid, comparable=comparable)
    made |= {x.unit: x for x in by_linear.values()}
    place = {unit.linears[0].name: i for i, unit in enumerate(units)}
    return dict(sorted(made.items(), key=lambda item: place[item[0].linears[0].name]))


def track_wide(
    wide: Mapping[Unit, Sequence[Form]],
) -> Iterable[tuple[Unit, Sequence[Form]]]:
    """With a bar: the first time each takes a decomposition of every linear and one of its own."""
    return track(wide.items(), "predict losses of whole MLPs", len(wide)) if wide else ()


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


def priced_in(menu: Menu) -> Budget:
    """What all of a menu is priced in: the words of a message."""
    return next(iter(menu.values())).budget


def chosen(menu: Menu, at: Mapping[Unit, int]) -> dict[Unit, Choice]:
    """What stands at these indices."""
    return {unit: menu[unit].choice(index) for unit, index in at.items()}


def floor(menu: Menu, retention: Mapping[Unit, float]) -> dict[Unit, int]:
    """The dearest option that each unit's retention pays for. Raises UserError where it pays for
    none.
    """
    found = {}
    for unit, options in menu.items():
        found[unit] = options.affordable(retention[unit])
        if found[unit] < 0:
            sizes = ", ".join(f"{x.m} x {x.n}" for x in unit.linears)
            raise UserError(
                f"{unit.name} ({sizes}): a retention of {retention[unit]:.4g} leaves rank 0;"
                f" {options.budget.remedy}, or choose an allocation with a higher minimum"
                " retention."
            )
    return found


def fill(menu: Menu, retention: Mapping[Unit, float], target: float) -> dict[Unit, int]:
    """`floor`, then one option more for each unit that the budget still pays for, where the floor
    took the most first.
    """
    at = floor(menu, retention)
    budget = target * sum(x.dense for x in menu.values())
    used = sum(float(menu[unit].prices[index]) for unit, index in at.items())

    def lost(unit: Unit) -> float:
        return retention[unit] * menu[unit].dense - float(menu[unit].prices[at[unit]])

    for unit in sorted(menu, key=lost, reverse=True):
        prices, index = menu[unit].prices, at[unit]
        more = float(prices[index + 1] - prices[index]) if index < menu[unit].last else 0.0
        if 0 < more <= budget - used:
            at[unit] += 1
            used += more
    return at


def water_fill(
    menu: Menu, base: Mapping[Unit, float], slope: Mapping[Unit, float], target: float, low: float
) -> dict[Unit, float]:
    """Retentions clip(base + level * slope, low, 1) with the one level that meets the target on
    average over what units cost.

    slope must be >= 0 and positive somewhere. Equals AdaSVD Eq. 20 with level = trr - mrr where
    nothing is clipped and all decoder layers have the same size. Raises UserError when no level can
    meet the target.
    """
    weight = {unit: options.dense for unit, options in menu.items()}
    total = sum(weight.values())

    def at(level: float) -> dict[Unit, float]:
        return {x: min(1.0, max(low, base[x] + level * slope[x])) for x in menu}

    def mean(level: float) -> float:
        shares = at(level)
        return sum(weight[x] * shares[x] for x in menu) / total

    bottom, top = -1.0, 1.0
    while mean(top) < target and top < 2**40:
        top *= 2
    most = target * (1 + ROUNDING)  # a floor that is the target itself is no floor above it
    while mean(bottom) > most and bottom > -(2**40):
        bottom *= 2
    if mean(top) < target or mean(bottom) > most:
        raise UserError(
            f"No allocation with retentions in [{low:.3g}, 1] averages {target:.4g}: change"
            f" {priced_in(menu).setting} or the minimum retention."
        )
    for _ in range(BISECTIONS):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if mean(middle) < target else (bottom, middle)
    return at(top)
