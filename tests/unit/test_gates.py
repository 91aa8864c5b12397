"""Mappings from scores to gates, and what gates cost: the soft count, the hard count, one threshold
for a budget, what stays.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specomp.forms.factors import Factors
from specomp.forms.pivoted import Pivoted
from specomp.models.family import LinearSpec
from specomp.numerics.gates import MAPPINGS, GateBudget
from specomp.slots import Form
from specomp.training.gated import price_of

examples = settings(deadline=None, max_examples=60, derandomize=True, database=None)
THRESHOLD = 0.5
PIVOTED = Pivoted(max_growth=2.0)
# start score, S there, the open range that scores can reach
DOCUMENTED = {
    "two_sigmoid": (0.0, 1.0, (0.0, 2.0)),
    "sigmoid": (3.0, 0.953, (0.0, 1.0)),
    "identity": (1.0, 1.0, (0.0, float("inf"))),
    "exp": (0.0, 1.0, (0.0, float("inf"))),
}


def spec(index: int, m: int, n: int) -> LinearSpec:
    return LinearSpec(
        name=f"linear{index}", kind=f"linear{index}", site=index, decoder_layer=0, m=m, n=n
    )


def specs(shapes: list[tuple[int, int]]) -> list[LinearSpec]:
    return [spec(i, m, n) for i, (m, n) in enumerate(shapes)]


def counts_of(linears: list[LinearSpec]) -> list[int]:
    return [min(x.m, x.n) for x in linears]


def budget_of(linears: list[LinearSpec], counts: list[int], form: Form | None = None) -> GateBudget:
    """Of two factors, unless another form is given."""
    return GateBudget([(x.m, x.n) for x in linears], counts, price_of(form or Factors()))


def pays(x: LinearSpec, rank: int) -> bool:
    """Whether two factors of this rank are fewer numbers than the matrix."""
    return rank * (x.m + x.n) < x.m * x.n


def by_hand(linears: list[LinearSpec], ranks: list[int]) -> float:
    """Stored over dense parameters; a linear at or above break-even is stored dense."""
    stored = sum(
        r * (x.m + x.n) if pays(x, r) else x.m * x.n for x, r in zip(linears, ranks, strict=True)
    )
    return stored / sum(x.m * x.n for x in linears)


def kept_counts(budget: GateBudget, gates: Tensor, threshold: float) -> list[int]:
    return [int(part.sum()) for part in budget.kept(gates, threshold).split(budget.counts)]


@st.composite
def problems(draw: st.DrawFn, *, ties: bool = False) -> tuple[list[LinearSpec], GateBudget, Tensor]:
    """Some linears and gates in (0, 2); all different unless ties are wanted."""
    sizes = st.integers(5 if ties else 1, 9)
    shapes = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4))
    linears = specs(shapes)
    counts = [draw(st.integers(1, k)) for k in counts_of(linears)]
    total, seed = sum(counts), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    gates = 2 * (torch.randperm(total, generator=generator).float() + 1) / (total + 1)
    if ties:
        gates = gates.round()
    return linears, budget_of(linears, counts), gates


# --- mappings -------------------------------------------------------------------------------------


def test_every_mapping_is_documented_here():
    assert DOCUMENTED.keys() == MAPPINGS.keys()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_start_and_range_of_a_mapping(name):
    mapping, (start, value, (low, high)) = MAPPINGS[name], DOCUMENTED[name]
    assert mapping.start == start
    assert float(mapping.to_gate(torch.tensor(start))) == pytest.approx(value, abs=5e-4)
    gates = mapping.to_gate(torch.linspace(-12, 12, 97))
    assert torch.isfinite(gates).all()
    assert float(gates.min()) >= low
    assert float(gates.max()) <= high
    assert (gates.diff() >= 0).all(), "a higher score is a higher gate"
    assert float(gates.min()) < THRESHOLD < float(gates.max()), "a score can cross the threshold"


def test_two_sigmoid_starts_as_the_dense_model_and_can_amplify():
    to_gate = MAPPINGS["two_sigmoid"].to_gate
    assert float(to_gate(torch.tensor(0.0))) == 1.0
    assert float(to_gate(torch.tensor(4.0))) > 1.9
    assert float(to_gate(torch.tensor(-1.0986))) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_mapping_has_a_gradient_at_its_start(name):
    score = torch.tensor(MAPPINGS[name].start, requires_grad=True)
    MAPPINGS[name].to_gate(score).backward()
    assert score.grad is not None
    assert float(score.grad) > 0


# --- the counts -----------------------------------------------------------------------------------


@examples
@given(problems())
def test_the_soft_count_becomes_the_hard_one_without_the_dense_cap(problem):
    """As the temperature falls, at a distance from the threshold; a linear without any kept
    component counts nothing.
    """
    linears, budget, gates = problem
    assume(float((gates - THRESHOLD).abs().min()) > 1e-3)
    counts = [int((part >= THRESHOLD).sum()) for part in gates.split(budget.counts)]
    uncapped = sum(c * (x.m + x.n) for c, x in zip(counts, linears, strict=True)) / sum(
        x.params for x in linears
    )
    distances = [
        abs(float(budget.soft_retention(gates, THRESHOLD, t)) - uncapped) for t in (1.0, 1e-2, 1e-5)
    ]
    assert distances[-1] <= 1e-5 * max(1.0, uncapped)
    assert distances[-1] <= distances[0] + 1e-6


def test_another_packing_prices_its_components_one_by_one():
    """Pivoted: r (m + n - r), the same soft as hard, and the gradient of the soft count is that
    price.
    """
    linears = specs([(4, 6), (7, 5)])
    budget = budget_of(linears, counts_of(linears), PIVOTED)
    gates = torch.tensor([1.5, 1.2, 0.1, 0.2] + [1.4, 1.3, 1.1, 0.0, 0.2])
    expected = (2 * (10 - 2) + 3 * (12 - 3)) / (24 + 35)
    assert budget.hard_retention(gates, THRESHOLD) == pytest.approx(expected)
    assert float(budget.soft_retention(gates, THRESHOLD, 1e-3)) == pytest.approx(expected)
    assert budget.retention_of(torch.tensor([4.0, 5.0])) == 1.0
    gates.requires_grad_()
    budget.soft_retention(gates, THRESHOLD, 0.3).backward()
    step = 1e-2
    for index in range(len(gates)):
        shift = torch.zeros(len(gates))
        shift[index] = step
        with torch.no_grad():
            up, down = (
                float(budget.soft_retention(gates + sign * shift, THRESHOLD, 0.3))
                for sign in (1, -1)
            )
        assert float(gates.grad[index]) == pytest.approx(
            (up - down) / (2 * step), rel=2e-2, abs=2e-4
        )


def test_the_soft_count_of_a_gate_at_the_threshold_is_a_half():
    linears = specs([(4, 6)])
    budget = budget_of(linears, [4])
    assert float(
        budget.soft_retention(torch.full((4,), THRESHOLD), THRESHOLD, 0.1)
    ) == pytest.approx(2 * 10 / 24)


def test_the_soft_count_may_exceed_one():
    """methods.md 1.4: with every component kept, LLaMA-7B's seven linears cost 1.58 times the dense
    ones.
    """
    linears = specs([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)])
    budget = budget_of(linears, counts_of(linears))
    gates = torch.ones(sum(counts_of(linears)))
    assert float(budget.soft_retention(gates, THRESHOLD, 0.02)) == pytest.approx(1.58, abs=0.005)
    assert budget.hard_retention(gates, THRESHOLD) == 1.0


@pytest.mark.parametrize("temperature", [0.3, 0.1])
def test_gradient_of_the_soft_count_against_finite_differences(temperature):
    linears = specs([(4, 6), (5, 5), (3, 8)])
    budget = budget_of(linears, counts_of(linears))
    gates = torch.linspace(0.1, 1.4, sum(counts_of(linears))).requires_grad_()
    budget.soft_retention(gates, THRESHOLD, temperature).backward()
    assert gates.grad is not None
    step = 1e-2
    for index in range(len(gates)):
        shift = torch.zeros(len(gates))
        shift[index] = step
        with torch.no_grad():
            up, down = (
                float(budget.soft_retention(gates + sign * shift, THRESHOLD, temperature))
                for sign in (1, -1)
            )
        assert float(gates.grad[index]) == pytest.approx(
            (up - down) / (2 * step), rel=2e-2, abs=2e-4
        )
    assert (gates.grad > 0).all(), "a higher gate always costs more"


@pytest.mark.parametrize("gate", [0.0, 0.4999, 0.5, 1.9])
def test_ranks_are_at_least_one(gate):
    linears = specs([(4, 6), (5, 5)])
    budget = budget_of(linears, counts_of(linears))
    ranks = budget.ranks(torch.full((9,), gate), THRESHOLD)
    assert ranks.tolist() == ([4, 5] if gate >= THRESHOLD else [1, 1])


@examples
@given(problems(), st.floats(0.01, 2.0))
def test_hard_retention_is_counted_with_the_dense_cap(problem, threshold):
    linears, budget, gates = problem
    ranks = [max(1, int((part >= threshold).sum())) for part in gates.split(budget.counts)]
    assert budget.ranks(gates, threshold).tolist() == ranks
    assert budget.hard_retention(gates, threshold) == pytest.approx(
        by_hand(linears, ranks), rel=1e-12
    )
    assert budget.hard_retention(gates, threshold) <= 1


@pytest.mark.parametrize(("rank", "stored"), [(1, 10), (2, 20), (3, 24), (4, 24)])
def test_from_break_even_on_a_linear_costs_m_n(rank, stored):
    """4 x 6 breaks even at 2.4."""
    budget = budget_of(specs([(4, 6)]), [4])
    assert budget.retention_of(torch.tensor([rank], dtype=torch.float64)) == pytest.approx(
        stored / 24
    )


def test_exactly_at_break_even_is_dense():
    """6 x 6 breaks even at 3, where both ways cost the same."""
    budget = budget_of(specs([(6, 6)]), [6])
    gates = torch.tensor([1.0, 1.0, 1.0, 0.1, 0.1, 0.1])
    assert budget.hard_retention(gates, THRESHOLD) == 1.0
    assert budget.kept(gates, THRESHOLD).all(), "stored dense: nothing is gained by dropping"


# --- one threshold for a budget -------------------------------------------------------------------


@examples
@given(problems(), st.floats(0.01, 0.99))
def test_the_threshold_meets_the_budget_and_one_component_more_would_not(problem, retention):
    linears, budget, gates = problem
    assume(by_hand(linears, [1] * len(linears)) <= retention)
    threshold = budget.threshold_for(gates, retention)
    found = budget.hard_retention(gates, threshold)
    assert found <= retention
    below = gates[gates < threshold]
    if threshold == 0:
        assert budget.hard_retention(gates, 0.0) <= retention
        return
    more = budget.hard_retention(gates, float(below.max()))
    assert more > retention
    assert more - found <= max(x.m + x.n for x in linears) / sum(x.params for x in linears) + 1e-12


@examples
@given(problems(), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_the_threshold_is_monotone(problem, first, second):
    _, budget, gates = problem
    low, high = sorted((first, second))
    assert budget.threshold_for(gates, low) >= budget.threshold_for(gates, high)


@examples
@given(problems(), st.sampled_from([1.0, 1.5]))
def test_everything_fits(problem, retention):
    _, budget, gates = problem
    assert budget.threshold_for(gates, retention) == 0.0
    assert budget.kept(gates, 0.0).all()


def test_everything_fits_after_components_were_dropped():
    linears = specs([(8, 8), (8, 8)])
    budget = budget_of(linears, [2, 3])
    gates = torch.tensor([1.0, 0.9, 0.001, 1.2, 0.3])
    assert budget.threshold_for(gates, 5 * 16 / 128) == 0.0
    assert budget.threshold_for(gates, 5 * 16 / 128 - 1e-6) == pytest.approx(
        (0.001 + 0.3) / 2, rel=1e-5
    ), "between dropped and kept"


@examples
@given(problems())
def test_a_budget_below_one_component_each_keeps_one_each(problem):
    linears, budget, gates = problem
    threshold = budget.threshold_for(gates, 1e-9)
    assert budget.ranks(gates, threshold).tolist() == [1] * len(linears)


def test_components_of_negative_gate_are_never_kept_by_a_budget():
    """How the pipeline marks components that no longer exist."""
    budget = budget_of(specs([(8, 8)]), [4])
    gates = torch.tensor([1.0, -1.0, 0.2, -1.0])
    assert budget.threshold_for(gates, 0.6) == 0.0
    assert budget.ranks(gates, 0.0).tolist() == [2]


# --- what stays -----------------------------------------------------------------------------------


@examples
@given(problems(), st.floats(0.0, 2.0))
def test_what_stays_is_what_is_counted(problem, threshold):
    linears, budget, gates = problem
    ranks = [int(x) for x in budget.ranks(gates, threshold)]
    keep = budget.kept(gates, threshold).split(budget.counts)
    for linear, rank, mask, part in zip(
        linears, ranks, keep, gates.split(budget.counts), strict=True
    ):
        if pays(linear, rank):
            assert int(mask.sum()) == rank
            assert set(part.topk(rank).indices.tolist()) == set(
                mask.nonzero().flatten().tolist()
            ), "the best ones"
        else:
            assert mask.all()


def test_each_linear_keeps_its_best():
    budget = budget_of(specs([(8, 8), (8, 8)]), [3, 3])
    keep = budget.kept(torch.tensor([0.1, 0.3, 0.2, 0.9, 0.1, 0.8]), THRESHOLD)
    assert keep.tolist() == [False, True, False, True, False, True]


def test_a_linear_stored_dense_keeps_all():
    budget = budget_of(specs([(4, 4), (8, 8)]), [4, 8])
    gates = torch.tensor([0.9, 0.8, 0.1, 0.1] + [0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert kept_counts(budget, gates, THRESHOLD) == [4, 2]


def test_what_stays_has_no_gradient():
    budget = budget_of(specs([(8, 8)]), [4])
    gates = torch.tensor([0.1, 0.6, 0.7, 0.2], requires_grad=True)
    assert not budget.kept(gates, THRESHOLD).requires_grad
    assert not budget.ranks(gates, THRESHOLD).requires_grad


def test_of_equal_gates_below_the_threshold_one_stays():
    """Equal gates are real: all of them before the first step, and those whose score is below 0
    under the clamped identity.
    """
    budget = budget_of(specs([(8, 8), (8, 8)]), [3, 3])
    gates = torch.tensor([0.0, 0.0, 0.0, 0.9, 0.1, 0.8])
    assert budget.ranks(gates, THRESHOLD).tolist() == [1, 2]
    assert kept_counts(budget, gates, THRESHOLD) == [1, 2]


@examples
@given(problems(ties=True), st.floats(0.0, 3.0))
def test_equal_gates_stay_as_counted(problem, threshold):
    linears, budget, gates = problem
    kept = kept_counts(budget, gates, threshold)
    assert by_hand(linears, kept) <= budget.hard_retention(gates, threshold) + 1e-12


def test_of_equal_gates_the_larger_singular_values_stay():
    """All scores tied, as after AdamW's first steps: the budget is met still, and every linear
    gives up the same share.
    """
    budget = budget_of(specs([(8, 8), (16, 16)]), [8, 16])
    gates = torch.full((24,), 0.75)
    threshold = budget.threshold_for(gates, 0.5)
    first, second = budget.kept(gates, threshold).split([8, 16])
    assert first.tolist() == [True] * 2 + [False] * 6
    assert second.tolist() == [True] * 4 + [False] * 12
    assert budget.hard_retention(gates, threshold) == 0.5
