"""Global allocation against every allocation there is, on tiny cases; its budget, on large ones."""

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from units import Refuse, menu, sizes, unit

from specomp.errors import UserError
from specomp.forms.factors import Factors
from specomp.forms.options import DENSE, chosen, hull
from specomp.forms.pivoted import Pivoted
from specomp.forms.prices import Bits, Budget, Numbers
from specomp.methods.global_loss import Curve, GlobalLossAllocation, curve, least_loss
from specomp.models.family import Unit
from specomp.numerics.grid import GridSpec
from specomp.slots import Choice, Form

examples = settings(deadline=None, max_examples=80, derandomize=True, database=None)
FORMS: dict[str, Form] = {"factors": Factors(), "pivoted": Pivoted(max_growth=2.0)}
Values = Mapping[str, Tensor]


def cost(m: int, n: int, rank: int, form: Form) -> int:
    """Numbers of an m x n matrix at a rank, counted without the code under test."""
    return rank * (m + n) if form == Factors() else rank * (m + n - rank)


def shape(x: Unit) -> tuple[int, int]:
    (linear,) = x.linears
    return linear.m, linear.n


def saves(x: Unit, rank: int, form: Form) -> bool:
    return cost(*shape(x), rank, form) < x.params


def allocate(
    units: Sequence[Unit],
    values: Values,
    compression: float,
    form: Form,
    *,
    normalize: bool = False,
    round_to: int = 1,
) -> dict[str, int]:
    """Ranks by name."""
    allocation = GlobalLossAllocation(normalize=normalize, round_to=round_to)
    offered = menu(units, form=form, values=values)
    choices = allocation(offered, Numbers(compression=compression).retention, Refuse())
    assert all((x.form == form) == saves(name, x.size, form) for name, x in choices.items())
    assert {x.form for x in choices.values()} <= {form, DENSE}
    return sizes(choices)


def lost(units: Sequence[Unit], values: Values, ranks: Mapping[str, int], form: Form) -> float:
    """Predicted loss, counted without the code under test: a dense linear loses nothing."""
    low = [x.name for x in units if saves(x, ranks[x.name], form)]
    return sum(float(values[name][ranks[name] :].double().square().sum()) for name in low)


def used(units: Sequence[Unit], ranks: Mapping[str, int], form: Form) -> int:
    return sum(min(cost(*shape(x), ranks[x.name], form), x.params) for x in units)


def brute_force(units: Sequence[Unit], values: Values, budget: float, form: Form) -> float:
    """The smallest loss of all allocations within a budget."""
    names = [x.name for x in units]
    every = itertools.product(*(range(1, min(shape(x)) + 1) for x in units))
    allocations = (dict(zip(names, ranks, strict=True)) for ranks in every)
    return min(lost(units, values, x, form) for x in allocations if used(units, x, form) <= budget)


def curves_of(units: Sequence[Unit], values: Values, form: Form) -> dict[Unit, Curve]:
    offered = menu(units, form=form, values=values)
    return {x: curve(options, normalize=False) for x, options in offered.items()}


def steps_of(curves: Mapping[Unit, Curve]) -> list[tuple[float, float]]:
    """(loss saved, parameters) of every step on every hull."""
    return [
        (float(c.losses[a] - c.losses[b]), float(c.costs[b] - c.costs[a]))
        for c in curves.values()
        for a, b in itertools.pairwise(hull(c.costs, c.losses))
    ]


@st.composite
def cases(draw) -> tuple[list[Unit], dict[str, Tensor]]:
    side = st.integers(3, 9)
    units = [unit(f"x{i}", draw(side), draw(side)) for i in range(draw(st.integers(2, 3)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    values = {}
    for x in units:
        # From steep to nearly flat spectra: where they are flat, dense is the better buy long
        # before break-even.
        decay, least = draw(st.sampled_from([0.3, 0.8, 0.99])), min(shape(x))
        noise = 0.5 + torch.rand(least, generator=generator)
        values[x.name] = (decay ** torch.arange(least) * noise).sort(descending=True).values
    return units, values


@examples
@given(cases(), st.floats(0.05, 0.6), st.sampled_from(sorted(FORMS)))
def test_optimal_for_what_it_spends_up_to_the_last_step(case, compression, packing):
    (units, values), form = case, FORMS[packing]
    target = Numbers(compression=compression).retention * sum(x.params for x in units)
    if target < used(units, {x.name: 1 for x in units}, form):
        return
    ranks = allocate(units, values, compression, form)
    assert used(units, ranks, form) <= target
    assert min(ranks.values()) >= 1
    # No more than the one step that the budget ends in is lost against the best of all allocations.
    last = max(saved for saved, _ in steps_of(curves_of(units, values, form)))
    best = brute_force(units, values, target, form)
    assert best - 1e-9 <= lost(units, values, ranks, form) <= best + last + 1e-9


@examples
@given(cases(), st.sampled_from(sorted(FORMS)), st.integers(0, 30))
def test_exactly_optimal_wherever_the_budget_ends_with_a_step(case, packing, count):
    (units, values), form = case, FORMS[packing]
    curves = curves_of(units, values, form)
    steps = sorted(((saved / more, more) for saved, more in steps_of(curves)), reverse=True)
    budget = sum(c.cheapest for c in curves.values()) + int(sum(more for _, more in steps[:count]))
    ranks = sizes(chosen(menu(units, form=form), least_loss(curves, budget)))
    assert used(units, ranks, form) <= budget
    best = brute_force(units, values, budget, form)
    assert lost(units, values, ranks, form) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_a_flat_spectrum_is_kept_dense_before_it_breaks_even():
    """Two factors of a flat 10 x 10 cost 20 a rank and save a tenth each: dense, at 100, saves
    twice as much per parameter.
    """
    units = [unit("flat", 10, 10), unit("steep", 10, 10)]
    values = {"flat": torch.ones(10), "steep": 10.0 * 0.1 ** torch.arange(10)}
    found = curves_of(units, values, Factors())[units[0]]
    assert hull(found.costs, found.losses) == [0, 4]
    assert allocate(units, values, 0.3, Factors()) == {"flat": 10, "steep": 2}


@pytest.mark.parametrize("packing", FORMS)
@pytest.mark.parametrize("compression", [0.2, 0.4, 0.6, 0.8])
def test_budget_to_a_thousandth_on_a_real_number_of_linears(packing, compression):
    units, values = smollm2()
    form = FORMS[packing]
    ranks = allocate(units, values, compression, form)
    kept = used(units, ranks, form) / sum(x.params for x in units)
    assert 0 <= Numbers(compression=compression).retention - kept < 1e-3
    assert min(ranks.values()) >= 1
    # What is moved from one linear to another would have to lose less than it gains: a Lagrangian
    # price separates them.
    marginal = [
        (float(values[name][rank - 1] ** 2), float(values[name][rank] ** 2))
        for name, rank in ranks.items()
        if packing == "factors" and name.endswith(".0") and 1 < rank < 288 - 1
    ]
    if len(marginal) > 1:
        assert max(after for _, after in marginal) <= 1.05 * min(before for before, _ in marginal)


def smollm2() -> tuple[list[Unit], dict[str, Tensor]]:
    """Twelve decoder layers of SmolLM2's shapes, with singular values of unlike scale and decay."""
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576)] + [(1536, 576)] * 2 + [(576, 1536)]
    units = [unit(f"{i}.{j}", m, n) for i in range(12) for j, (m, n) in enumerate(shapes)]
    generator = torch.Generator().manual_seed(0)
    values = {}
    for x in units:
        scale, decay = torch.rand(2, generator=generator)
        falling = torch.arange(1, min(shape(x)) + 1).float() ** -(0.2 + decay)
        values[x.name] = (10 * scale) * falling
    return units, values


@pytest.mark.parametrize("packing", FORMS)
@pytest.mark.parametrize("grid", [None, GridSpec(bits=4, group_size=None, symmetric=False)])
def test_a_budget_of_bits_is_met_as_well(packing, grid):
    """The same on other prices; beside rounded factors, dense linears are dear."""
    (units, values), form, budget = smollm2(), FORMS[packing], Bits(bits=3)
    offered = menu(units, form=form, values=values, budget=budget, grid=grid, dtype=torch.bfloat16)
    share = budget.share(torch.bfloat16)
    choices = GlobalLossAllocation(normalize=False, round_to=1)(offered, share, Refuse())
    spent = sum(price(x, choice, budget, grid) for x, choice in choices.items())
    allowed = 3 * sum(x.params for x in units)
    assert 0 <= allowed - spent < 1e-3 * allowed


def price(x: Unit, choice: Choice, budget: Budget, grid: GridSpec | None) -> int:
    return budget.price(choice.form.parts(x, choice.size, grid), torch.bfloat16)


def test_normalizing_compares_shares_of_energy():
    units = [unit("loud", 40, 40), unit("quiet", 40, 40)]
    falling = 0.9 ** torch.arange(40)
    values = {"loud": 1000 * falling, "quiet": falling}
    plain, shares = (allocate(units, values, 0.6, Factors(), normalize=x) for x in (False, True))
    assert plain["loud"] > 2 * plain["quiet"]
    assert abs(shares["loud"] - shares["quiet"]) <= 1


@pytest.mark.parametrize("round_to", [8, 64])
def test_rounded_ranks(round_to):
    units = [unit(f"x{i}", 300, 200) for i in range(12)] + [unit("small", 12, 10)]
    generator, form = torch.Generator().manual_seed(1), FORMS["pivoted"]
    values = {
        x.name: torch.rand(min(shape(x)), generator=generator).sort(descending=True).values
        for x in units
    }
    ranks = allocate(units, values, 0.3, form, round_to=round_to)
    low = {x.name for x in units if saves(x, ranks[x.name], form)}
    assert low - {"small"}
    assert all(ranks[name] % round_to == 0 for name in low if name != "small")
    assert used(units, ranks, form) <= 0.7 * sum(x.params for x in units)


def test_a_budget_below_the_smallest_rounded_ranks_says_what_to_change():
    said = r"round_to=64 take 27904 parameters, the budget is 6000: lower round_to"
    with pytest.raises(UserError, match=said):
        allocate([unit("x", 300, 200)], {"x": torch.ones(200)}, 0.9, FORMS["pivoted"], round_to=64)


def test_linears_without_loss_get_rank_one_and_nothing_is_divided_by_zero():
    units = [unit("silent", 20, 20), unit("loud", 20, 20)]
    values = {"silent": torch.zeros(20), "loud": torch.ones(20)}
    for normalize in (False, True):
        ranks = allocate(units, values, 0.45, Factors(), normalize=normalize)
        assert ranks == {"silent": 1, "loud": 20}
