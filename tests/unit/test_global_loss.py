"""Global allocation against every allocation there is, on tiny cases; and its budget, on large ones."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specomp.forms.options import stored
from specomp.errors import UserError
from specomp.numerics.factors import Spectrum
from specomp.methods.global_loss import GlobalLossAllocation, curve, least_loss
from specomp.models.family import LinearSpec
from specomp.numerics.ratio import Cost, Ratio, is_low_rank, pair_cost, pivoted_cost

examples = settings(deadline=None, max_examples=80, derandomize=True, database=None)
COSTS = {"factors": pair_cost, "pivoted": pivoted_cost}


def linear(name: str, m: int, n: int) -> LinearSpec:
    return LinearSpec(name, m, n, 0, 0, "q")


def spectra(values: dict[str, Tensor]):
    return lambda name: Spectrum(torch.zeros(0), values[name], torch.zeros(0))


def refuse(*_):
    raise AssertionError("not needed by this allocation")


def allocate(
    linears: list[LinearSpec], values: dict[str, Tensor], compression: float, cost: Cost, *, normalize: bool = False, round_to: int = 1
) -> dict[str, int]:
    allocation = GlobalLossAllocation(normalize=normalize, round_to=round_to)
    return allocation(linears, Ratio(compression=compression), refuse, spectra(values), cost, refuse)


def lost(linears: list[LinearSpec], values: dict[str, Tensor], ranks: dict[str, int], cost: Cost) -> float:
    """Predicted loss, counted without the code under test: a dense linear loses nothing."""
    kept = [x for x in linears if is_low_rank(x.m, x.n, ranks[x.name], cost)]
    return sum(float(values[x.name][ranks[x.name] :].double().square().sum()) for x in kept)


def used(linears: list[LinearSpec], ranks: dict[str, int], cost: Cost) -> int:
    return sum(stored(x, ranks[x.name], cost) for x in linears)


def brute_force(linears: list[LinearSpec], values: dict[str, Tensor], budget: float, cost: Cost) -> float:
    """The smallest loss of all allocations within a budget."""
    choices = [range(1, min(x.m, x.n) + 1) for x in linears]
    allocations = (dict(zip([x.name for x in linears], ranks, strict=True)) for ranks in itertools.product(*choices))
    return min(lost(linears, values, ranks, cost) for ranks in allocations if used(linears, ranks, cost) <= budget)


@st.composite
def cases(draw) -> tuple[list[LinearSpec], dict[str, Tensor]]:
    linears = [linear(f"x{i}", draw(st.integers(3, 9)), draw(st.integers(3, 9))) for i in range(draw(st.integers(2, 3)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    values = {}
    for x in linears:
        # From steep to nearly flat spectra: where they are flat, dense is the better buy long before break-even.
        decay = draw(st.sampled_from([0.3, 0.8, 0.99]))
        noise = 0.5 + torch.rand(min(x.m, x.n), generator=generator)
        values[x.name] = (decay ** torch.arange(min(x.m, x.n)) * noise).sort(descending=True).values
    return linears, values


@examples
@given(cases(), st.floats(0.05, 0.6), st.sampled_from(sorted(COSTS)))
def test_optimal_for_what_it_spends_up_to_the_last_step(case, compression, packing):
    (linears, values), cost = case, COSTS[packing]
    target = Ratio(compression=compression).retention * sum(x.params for x in linears)
    if target < sum(min(cost(x.m, x.n, 1), x.params) for x in linears):
        return
    ranks = allocate(linears, values, compression, cost)
    spent = used(linears, ranks, cost)
    assert spent <= target
    assert min(ranks.values()) >= 1
    # No more than the one step that the budget ends in is lost against the best of all allocations.
    curves = {x.name: curve(x, values[x.name], cost, 1, normalize=False) for x in linears}
    last = max(
        float(c.losses[a] - c.losses[b]) for c in curves.values() for a, b in zip(c.hull(), c.hull()[1:], strict=False) if len(c.hull()) > 1
    )
    best = brute_force(linears, values, target, cost)
    found = lost(linears, values, ranks, cost)
    assert best - 1e-9 <= found <= best + last + 1e-9


@examples
@given(cases(), st.sampled_from(sorted(COSTS)), st.integers(0, 30))
def test_exactly_optimal_wherever_the_budget_ends_with_a_step(case, packing, count):
    (linears, values), cost = case, COSTS[packing]
    curves = {x.name: curve(x, values[x.name], cost, 1, normalize=False) for x in linears}
    steps = sorted(
        (
            (float(c.losses[a] - c.losses[b]) / float(c.costs[b] - c.costs[a]), float(c.costs[b] - c.costs[a]))
            for c in curves.values()
            for a, b in zip(c.hull(), c.hull()[1:], strict=False)
        ),
        reverse=True,
    )
    budget = sum(c.cheapest for c in curves.values()) + int(sum(more for _, more in steps[: min(count, len(steps))]))
    ranks = least_loss(curves, budget)
    assert used(linears, ranks, cost) <= budget
    assert lost(linears, values, ranks, cost) == pytest.approx(brute_force(linears, values, budget, cost), rel=1e-6, abs=1e-9)


def test_a_flat_spectrum_is_kept_dense_before_it_breaks_even():
    """Two factors of a flat 10 x 10 cost 20 a rank and save a tenth each: dense, at 100, saves twice as much per parameter."""
    linears = [linear("flat", 10, 10), linear("steep", 10, 10)]
    values = {"flat": torch.ones(10), "steep": 10.0 * 0.1 ** torch.arange(10)}
    assert curve(linears[0], values["flat"], pair_cost, 1, normalize=False).hull() == [0, 4]
    assert allocate(linears, values, 0.3, pair_cost) == {"flat": 10, "steep": 2}


@pytest.mark.parametrize("packing", COSTS)
@pytest.mark.parametrize("compression", [0.2, 0.4, 0.6, 0.8])
def test_budget_to_a_thousandth_on_a_real_number_of_linears(packing, compression):
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    linears = [linear(f"{layer}.{i}", m, n) for layer in range(12) for i, (m, n) in enumerate(shapes)]
    generator = torch.Generator().manual_seed(0)
    values = {}
    for x in linears:
        scale, decay = torch.rand(2, generator=generator)
        values[x.name] = (10 * scale) * torch.arange(1, min(x.m, x.n) + 1).float() ** -(0.2 + decay)
    cost = COSTS[packing]
    ranks = allocate(linears, values, compression, cost)
    dense = sum(x.params for x in linears)
    assert 0 <= Ratio(compression=compression).retention - used(linears, ranks, cost) / dense < 1e-3
    assert min(ranks.values()) >= 1
    shared = {x.name: rank for x, rank in zip(linears, ranks.values(), strict=True)}
    # What is moved from one linear to another would have to lose less than it gains: a Lagrangian price separates them.
    marginal = [
        (float(values[name][rank - 1] ** 2), float(values[name][rank] ** 2))
        for name, rank in shared.items()
        if cost is pair_cost and name.endswith(".0") and 1 < rank < 288 - 1
    ]
    if len(marginal) > 1:
        assert max(after for _, after in marginal) <= 1.05 * min(before for before, _ in marginal)


def test_normalizing_compares_shares_of_energy():
    linears = [linear("loud", 40, 40), linear("quiet", 40, 40)]
    shape = 0.9 ** torch.arange(40)
    values = {"loud": 1000 * shape, "quiet": shape}
    plain, shares = (allocate(linears, values, 0.6, pair_cost, normalize=x) for x in (False, True))
    assert plain["loud"] > 2 * plain["quiet"]
    assert abs(shares["loud"] - shares["quiet"]) <= 1


@pytest.mark.parametrize("round_to", [8, 64])
def test_rounded_ranks(round_to):
    linears = [linear(f"x{i}", 300, 200) for i in range(12)] + [linear("small", 12, 10)]
    generator = torch.Generator().manual_seed(1)
    values = {x.name: torch.rand(min(x.m, x.n), generator=generator).sort(descending=True).values for x in linears}
    ranks = allocate(linears, values, 0.3, pivoted_cost, round_to=round_to)
    low = {x.name for x in linears if is_low_rank(x.m, x.n, ranks[x.name], pivoted_cost)}
    assert low - {"small"}
    assert all(ranks[name] % round_to == 0 for name in low if name != "small")
    assert used(linears, ranks, pivoted_cost) <= 0.7 * sum(x.params for x in linears)


def test_a_budget_below_the_smallest_rounded_ranks_says_what_to_change():
    linears, values = [linear("x", 300, 200)], {"x": torch.ones(200)}
    with pytest.raises(UserError, match=r"round_to=64 take 27904 parameters, the budget is 6000: lower round_to"):
        allocate(linears, values, 0.9, pivoted_cost, round_to=64)


def test_linears_without_loss_get_rank_one_and_nothing_is_divided_by_zero():
    linears = [linear("silent", 20, 20), linear("loud", 20, 20)]
    values = {"silent": torch.zeros(20), "loud": torch.ones(20)}
    for normalize in (False, True):
        ranks = allocate(linears, values, 0.45, pair_cost, normalize=normalize)
        assert ranks == {"silent": 1, "loud": 20}
