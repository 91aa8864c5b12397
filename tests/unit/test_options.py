"""Options that meet a budget: the shared rounding and water-filling, and the allocations of AdaSVD,
SVD-LLM V2 and ASVD."""

import math
from fractions import Fraction
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from units import Known, Refuse, menu, sizes, unit

from specomp.errors import UserError
from specomp.forms.factors import Factors
from specomp.forms.options import DENSE, Options, chosen, fill, floor, water_fill
from specomp.forms.pivoted import Pivoted
from specomp.forms.prices import Bits, Budget, Numbers
from specomp.methods.adasvd import AdaCR, normalized_importance
from specomp.methods.asvd import SensitivityAllocation, cut
from specomp.methods.svd import FullRank, UniformAllocation
from specomp.methods.svd_llm import TypeLossAllocation, type_losses
from specomp.models.family import LinearSpec, Unit
from specomp.numerics.grid import GridSpec
from specomp.numerics.ratio import break_even_rank
from specomp.numerics.statistics import IOCosine, Stats
from specomp.slots import Choice, Form

examples = settings(deadline=None, max_examples=60, derandomize=True, database=None)
side = st.integers(1, 5000)

LLAMA_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
LLAMA_7B |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
OPT_6_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
OPT_6_7B |= {"fc1": (16384, 4096), "fc2": (4096, 16384)}
# Largest and smallest normalized importance of a decoder layer, read off AdaSVD's Figure 4.
PUBLISHED = [(LLAMA_7B, 3.320, 0.350), (OPT_6_7B, 16.754, 0.043)]
# Ranks of LLaMA-7B's 4096 x 4096 and 4096 x 11008 matrices by percent kept.
RANKS = {
    80: (1638, 2388),
    60: (1228, 1791),
    50: (1024, 1492),
    40: (819, 1194),
    30: (614, 895),
    20: (409, 597),
}
PAIRS, PIVOTED = Factors(), Pivoted(max_growth=2.0)
INT4 = GridSpec(bits=4, group_size=None, symmetric=False)
# What is chosen among, in which currency, rounded to what.
MARKETS: dict[str, tuple[Form, Budget, GridSpec | None]] = {
    "numbers": (PAIRS, Numbers(compression=0.0), None),
    "numbers, pivoted": (PIVOTED, Numbers(compression=0.0), None),
    "bits": (PAIRS, Bits(bits=16), None),
    "bits, pivoted": (PIVOTED, Bits(bits=16), None),
    "bits, rounded": (PAIRS, Bits(bits=16), INT4),
    "bits, rounded in groups": (
        PAIRS,
        Bits(bits=16),
        GridSpec(bits=3, group_size=16, symmetric=True),
    ),
    "bits, pivoted, rounded": (PIVOTED, Bits(bits=16), INT4),
}


def decoder(shapes: dict[str, tuple[int, int]], count: int) -> list[Unit]:
    """The units of as many decoder layers."""
    names = [(i, kind, m, n) for i in range(count) for kind, (m, n) in shapes.items()]
    return [unit(f"layers.{i}.{kind}", m, n, decoder_layer=i, kind=kind) for i, kind, m, n in names]


def shape(x: Unit) -> tuple[int, int]:
    (linear,) = x.linears
    return linear.m, linear.n


def kept(units: list[Unit], ranks: dict[str, int]) -> float:
    """Stored over dense parameters, counted without the code under test."""
    shapes = {x.name: shape(x) for x in units}
    total = sum(min(ranks[name] * (m + n), m * n) for name, (m, n) in shapes.items())
    return total / sum(m * n for m, n in shapes.values())


@lru_cache(maxsize=64)
def ladder(m: int, n: int, form: Form) -> Options:
    """The options of one m x n linear."""
    x = unit("x", m, n)
    return menu([x], form=form)[x]


@lru_cache(maxsize=4)
def pairs_of(*units: Unit) -> dict[Unit, Options]:
    """The menu of large units, made once: nothing in it depends on a budget."""
    return menu(units)


def rank_of(m: int, n: int, retention: float, form: Form = PAIRS) -> int:
    """The rank that a retention pays for; 0: none."""
    options = ladder(m, n, form)
    index = options.affordable(retention)
    return 0 if index < 0 else options.choice(index).size


def ranks_at(units: list[Unit], at: dict[Unit, int]) -> dict[str, int]:
    """Of indices in the menu of two factors."""
    return sizes(chosen(menu(units), at))


@st.composite
def wishes(draw, count: int = 8) -> tuple[list[Unit], dict[Unit, float], float]:
    """Units of mixed sizes with retentions around, and on average equal to, a target."""
    mixed = st.integers(40, 400)
    units = [unit(f"x{i}", draw(mixed), draw(mixed)) for i in range(draw(st.integers(1, count)))]
    target = draw(st.floats(0.2, 0.9))
    base = {x: draw(st.floats(0.15, 1.2)) for x in units}
    slope = dict.fromkeys(base, 1.0)
    return units, water_fill(menu(units), base, slope, target, 0.1), target


# Options.


def test_options_are_the_ranks_that_pay_and_dense():
    x = unit("x", 30, 60)  # break-even at 20
    options = menu([x])[x]
    assert options.prices.tolist() == [90.0 * rank for rank in range(1, 20)] + [1800.0]
    assert options.sizes.tolist() == [*range(1, 20), 30]
    assert [options.choice(i) for i in (0, 18, 19)] == [
        Choice(PAIRS, 1),
        Choice(PAIRS, 19),
        Choice(DENSE, 30),
    ]
    assert options.last == 19 and len(options) == 20
    assert options.dense == 1800


@examples
@given(side, side)
def test_no_rank_is_offered_that_costs_as_much_as_dense(m, n):
    x, least = unit("x", m, n), min(m, n)
    pairs, pivots = menu([x])[x], menu([x], form=PIVOTED)[x]
    assert pairs.sizes[:-1].tolist() == [r for r in range(1, least) if r * (m + n) < m * n]
    assert pivots.sizes[:-1].tolist() == list(range(1, least))
    for options in (pairs, pivots):
        assert options.choice(options.last) == Choice(DENSE, least)
        assert bool((options.prices.diff() > 0).all())


@pytest.mark.parametrize("market", MARKETS)
def test_options_are_sorted_and_priced_one_by_one(market):
    form, budget, grid = MARKETS[market]
    for m, n in ((24, 40), (40, 24), (33, 33)):
        x = unit("x", m, n)
        options = menu([x], form=form, budget=budget, grid=grid, dtype=torch.bfloat16)[x]
        assert bool((options.prices.diff() >= 0).all())
        assert float(options.prices[options.last]) > float(options.prices[options.last - 1])
        for i in range(options.last):
            choice = options.choice(i)
            price = budget.price(choice.form.parts(x, choice.size, grid), torch.bfloat16)
            assert price == float(options.prices[i]), choice
        offered = set(options.sizes[: options.last].tolist())
        for rank in set(form.sizes(x)) - offered:
            assert budget.price(form.parts(x, rank, grid), torch.bfloat16) >= options.dense


def test_the_loss_of_an_option_is_what_its_rank_drops():
    x, values = unit("x", 6, 4), torch.tensor([3.0, 2.0, 1.0, 0.5])
    options = menu([x], form=PIVOTED, values={"x": values})[x]
    assert options.losses.dtype == torch.float64
    assert options.losses.tolist() == pytest.approx([5.25, 1.25, 0.25, 0.0])
    assert options.whole == pytest.approx(14.25)
    assert [option.loss for option in options] == options.losses.tolist()
    assert [option.price for option in options] == options.prices.tolist()


def test_several_forms_compete_by_their_price():
    """A menu of both packings has the ranks of both, each at its price."""
    x = unit("x", 10, 10)
    budget = Numbers(compression=0.0)
    forms = [PAIRS, PIVOTED]
    options = Options(x, forms, budget, torch.float32, Known(), None)
    found = [(float(price), options.choice(i)) for i, price in enumerate(options.prices)]
    pairs = [(20.0 * r, Choice(PAIRS, r)) for r in range(1, 5)]
    pivots = [(r * (20.0 - r), Choice(PIVOTED, r)) for r in range(1, 10)]
    expected = sorted([*pairs, *pivots], key=lambda entry: entry[0])
    assert found == [*expected, (100.0, Choice(DENSE, 10))]


# Which option a retention pays for.


@pytest.mark.parametrize(("percent", "ranks"), RANKS.items())
def test_llama_7b_ranks_are_the_published_ones(percent, ranks):
    for retention in (percent / 100, Numbers(compression=(100 - percent) / 100).retention):
        assert rank_of(4096, 4096, retention) == ranks[0]
        assert rank_of(4096, 11008, retention) == rank_of(11008, 4096, retention) == ranks[1]


def test_binary_fractions_do_not_lose_a_rank():
    retention = Numbers(compression=0.8).retention
    assert retention < 0.2
    assert retention * 100 * 100 / 200 < 10
    assert rank_of(100, 100, retention) == 10
    assert rank_of(1000, 1000, 0.6) == 300


@examples
@given(side, side, st.integers(1, 99))
def test_rank_is_the_exact_floor_of_decimal_ratios(m, n, percent):
    exact = math.floor(Fraction(100 - percent, 100) * m * n / (m + n))
    assert rank_of(m, n, Numbers(compression=percent / 100).retention) == exact


@examples
@given(side, side, st.floats(0.01, 0.99))
def test_two_factors_are_priced_by_the_published_formula(m, n, retention):
    assert rank_of(m, n, retention) == math.floor(retention * m * n / (m + n) + 1e-9)


@pytest.mark.parametrize("market", MARKETS)
@examples
@given(m=st.integers(1, 200), n=st.integers(1, 200), retention=st.floats(0.01, 0.99))
def test_an_affordable_option_is_the_dearest_that_the_retention_pays_for(market, m, n, retention):
    form, budget, grid = MARKETS[market]
    x = unit("x", m, n)
    options = menu([x], form=form, budget=budget, grid=grid)[x]
    index, paid = options.affordable(retention), retention * options.dense
    assert index < 0 or float(options.prices[index]) <= paid * (1 + 1e-9)
    assert float(options.prices[index + 1]) > paid


@examples
@given(side, side, st.floats(0.01, 0.99))
def test_pivots_buy_at_least_the_rank_of_two_factors(m, n, retention):
    rank = rank_of(m, n, retention, PIVOTED)
    assert rank >= rank_of(m, n, retention)
    assert rank * (m + n - rank) <= retention * m * n + 1e-9 * (m + n) * rank
    above = rank + 1
    assert above >= min(m, n) or above * (m + n - above) > retention * m * n


def test_everything_is_dense():
    for form in (PAIRS, PIVOTED):
        assert [rank_of(30, 60, retention, form) for retention in (1.0, 1.7)] == [30, 30]


# Rounding.


def test_floor_of_the_wish_or_dense():
    a, b, c = units = [unit("a", 100, 100), unit("b", 100, 300), unit("c", 10, 20)]
    assert ranks_at(units, floor(menu(units), {a: 0.5, b: 0.999, c: 1.7})) == {
        "a": 25,
        "b": 74,
        "c": 10,
    }


def test_rank_zero_is_refused_by_name():
    units = [unit("layers.2.q", 64, 64), unit("layers.3.k", 8, 64)]
    said = r"layers\.3\.k \(8 x 64\): a retention of 0\.1 leaves rank 0; lower ratio\.compression"
    with pytest.raises(UserError, match=said) as caught:
        floor(menu(units), dict.fromkeys(units, 0.1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("market", MARKETS)
@examples
@given(wish=wishes(3))
def test_filling_never_exceeds_the_budget_and_ends_within_one_option(market, wish):
    (units, retention, target), (form, budget, grid) = wish, MARKETS[market]
    offered = menu(units, form=form, budget=budget, grid=grid)
    at, floors = fill(offered, retention, target), floor(offered, retention)
    allowed = target * sum(x.dense for x in offered.values())
    used = sum(float(offered[x].prices[i]) for x, i in at.items())
    assert used <= allowed * (1 + 1e-9)
    assert allowed - used < max(float(x.prices.diff().max()) for x in offered.values())
    assert all(0 <= at[x] - floors[x] <= 1 for x in units)
    for x in units:  # whoever got nothing could not be afforded
        if at[x] == floors[x] < offered[x].last:
            assert used + float(offered[x].prices[at[x] + 1] - offered[x].prices[at[x]]) > allowed


def test_filling_starts_where_the_floor_took_the_most():
    a, b, c = units = [unit("a", 100, 100), unit("b", 100, 100), unit("c", 100, 100)]
    wish = {a: 0.404, b: 0.418, c: 0.408}  # ranks 20.2, 20.9, 20.4
    assert ranks_at(units, fill(menu(units), wish, 0.407)) == {"a": 20, "b": 21, "c": 20}
    assert ranks_at(units, fill(menu(units), wish, 0.414)) == {"a": 20, "b": 21, "c": 21}


@pytest.mark.parametrize("compression", [0.2, 0.4, 0.6, 0.8])
def test_uniform_allocation(compression):
    units, share = decoder(LLAMA_7B, 4), Numbers(compression=compression).retention
    published = sizes(UniformAllocation(exact_budget=False)(menu(units), share, Refuse()))
    assert published == {x.name: rank_of(*shape(x), share) for x in units}
    exact = sizes(UniformAllocation(exact_budget=True)(menu(units), share, Refuse()))
    assert kept(units, published) <= kept(units, exact) <= share * (1 + 1e-12)
    assert kept(units, exact) == pytest.approx(share, abs=1e-5)


def test_full_rank_keeps_everything():
    units = decoder(LLAMA_7B, 2)
    choices = FullRank()(menu(units), 0.5, Refuse())
    assert {x.form for x in choices.values()} == {DENSE}
    assert kept(units, sizes(choices)) == 1


# Water-filling.


@examples
@given(wishes(), st.integers(0, 999))
def test_water_filling_meets_the_target_within_its_bounds(wish, seed):
    units, _, target = wish
    generator = torch.Generator().manual_seed(seed)
    slope = {x: float(torch.rand(1, generator=generator)) + 0.01 for x in units}
    base = {x: 0.3 * float(torch.rand(1, generator=generator)) for x in units}
    shares = water_fill(menu(units), base, slope, target, 0.1)
    mean = sum(x.params * shares[x] for x in units) / sum(x.params for x in units)
    assert mean == pytest.approx(target, rel=1e-9)
    assert all(0.1 <= share <= 1 for share in shares.values())
    free = [(shares[x] - base[x]) / slope[x] for x in shares if 0.1 < shares[x] < 1]
    # One level for all that are not clipped.
    assert all(level == pytest.approx(free[0], rel=1e-6, abs=1e-9) for level in free)


@pytest.mark.parametrize("compression", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
def test_a_floor_at_the_target_itself_is_uniform(compression):
    """mrr = trr, the end of AdaSVD's Table 3d: the mean over SmolLM2's linears may come out one
    rounding above the target."""
    shapes = {
        "q": (576, 576),
        "k": (192, 576),
        "v": (192, 576),
        "o": (576, 576),
        "gate": (1536, 576),
        "up": (1536, 576),
        "down": (576, 1536),
    }
    units, target = decoder(shapes, 30), 1 - compression
    slope = {x: 1.0 + x.decoder_layer for x in units}
    shares = water_fill(menu(units), dict.fromkeys(units, target), slope, target, target)
    assert all(share == pytest.approx(target) for share in shares.values())


def test_water_filling_without_a_solution_is_refused():
    a, b = units = [unit("a", 50, 50), unit("b", 50, 50)]
    said = r"No allocation with retentions in \[0\.6, 1\] averages 0\.5: change ratio\.compression"
    with pytest.raises(UserError, match=said):
        water_fill(menu(units), {a: 0.6, b: 0.6}, {a: 1.0, b: 1.0}, 0.5, 0.6)
    with pytest.raises(UserError, match="averages 0.9"):
        water_fill(menu(units), {a: 0.2, b: 0.2}, {a: 0.0, b: 1.0}, 0.9, 0.1)


# AdaSVD.


def importances(count: int, most: float, least: float) -> list[float]:
    """Mean 1: the first decoder layer is the most important, the next the least, then all alike."""
    return [most, least] + [(count - most - least) / (count - 2)] * (count - 2)


class Cosines(Refuse):
    """The cosine of every decoder layer."""

    def __init__(self, cosine: list[float]) -> None:
        self.cosine = cosine

    def stats(self, linear: LinearSpec) -> Stats:
        return Stats(
            {IOCosine(): torch.tensor(self.cosine[linear.decoder_layer], dtype=torch.float64)}
        )


def adacr(
    units,
    importance: list[float],
    compression: float,
    *,
    budget: str = "water_filling",
    kind: str = "block_influence",
    gap=0.1,
) -> dict[str, int]:
    """Ranks, from the cosines that have this importance."""
    scale = 0.9 / max(importance)
    reads = Cosines([1 - scale * x for x in importance])
    allocation = AdaCR(min_retention_gap=gap, importance=kind, budget=budget)
    return sizes(allocation(pairs_of(*units), Numbers(compression=compression).retention, reads))


def test_importance_has_mean_one():
    cosine = {0: 0.2, 1: 0.9, 2: 0.7}
    assert normalized_importance(cosine, "block_influence") == pytest.approx(
        {0: 2.0, 1: 0.25, 2: 0.75}
    )
    assert normalized_importance(cosine, "cosine") == pytest.approx({0: 1 / 3, 1: 1.5, 2: 7 / 6})


@pytest.mark.parametrize("compression", [0.4, 0.5, 0.6])
def test_equation_20_keeps_the_mean_where_nothing_is_clipped(compression):
    importance = importances(32, 3.320, 0.350)
    trr, gap = Numbers(compression=compression).retention, 0.05
    printed = [trr - gap + i * gap for i in importance]
    assert sum(printed) / 32 == pytest.approx(trr)
    assert max(printed) < 1
    units = decoder(LLAMA_7B, 32)
    slope = {x: importance[x.decoder_layer] for x in units}
    level = water_fill(pairs_of(*units), dict.fromkeys(units, trr - gap), slope, trr, trr - gap)
    assert [level[x] for x in units if x.name.endswith(".q")] == pytest.approx(printed, rel=1e-9)
    raw = adacr(units, importance, compression, budget="raw", gap=gap)
    assert raw == {x.name: rank_of(*shape(x), printed[x.decoder_layer]) for x in units}
    filled = adacr(units, importance, compression, gap=gap)
    assert all(0 <= filled[name] - raw[name] <= 1 for name in raw)


@pytest.mark.parametrize(("shapes", "most", "least"), PUBLISHED)
@pytest.mark.parametrize("compression", [0.4, 0.5, 0.6, 0.7, 0.8])
def test_adacr_meets_the_budget_for_the_published_importances(shapes, most, least, compression):
    units, trr = decoder(shapes, 32), Numbers(compression=compression).retention
    importance = importances(32, most, least)
    ranks = adacr(units, importance, compression)
    assert trr * (1 - 1e-3) <= kept(units, ranks) <= trr * (1 + 1e-12)
    for x in units:
        assert rank_of(*shape(x), trr - 0.1) <= ranks[x.name] <= min(shape(x))
    # More important decoder layers never get less.
    order = sorted(range(32), key=lambda i: importance[i])
    for kind in shapes:
        by_importance = [ranks[f"layers.{i}.{kind}"] for i in order]
        assert all(
            after >= before - 1
            for before, after in zip(by_importance, by_importance[1:], strict=False)
        )
        assert by_importance[-1] > by_importance[0]


def test_adacr_keeps_an_all_important_decoder_layer_dense():
    units = decoder(OPT_6_7B, 32)
    importance = importances(32, 16.754, 0.043)
    ranks = adacr(units, importance, 0.6)  # Eq. 20 asks for 1.975 here
    assert all(ranks[x.name] == min(shape(x)) for x in units if x.decoder_layer == 0)
    # Unclipped elsewhere: the published equation keeps too little once the first decoder layer
    # cannot keep more than everything.
    assert kept(units, adacr(units, importance, 0.6, budget="raw")) < 0.4 * 0.95
    assert kept(units, ranks) == pytest.approx(0.4, rel=1e-3)


def test_raw_equation_20_misses_the_budget_where_decoder_layers_differ_in_size():
    units = [unit("a", 1000, 1000, decoder_layer=0), unit("b", 3000, 3000, decoder_layer=1)]
    raw = adacr(units, [1.5, 0.5], 0.6, budget="raw")
    assert kept(units, raw) == pytest.approx((0.45 + 9 * 0.35) / 10, abs=1e-3)
    assert kept(units, adacr(units, [1.5, 0.5], 0.6)) == pytest.approx(0.4, rel=1e-3)


def test_cosine_as_printed_barely_differs_from_uniform():
    units = decoder(LLAMA_7B, 8)
    # 1 - cos, before adacr's helper scales them to 0.9 at most
    importance = [0.2, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05, 0.1]
    cosine = [1 - value for value in importance]
    printed, influence = (
        normalized_importance(dict(enumerate(cosine)), kind)
        for kind in ("cosine", "block_influence")
    )
    assert max(abs(value - 1) for value in printed.values()) < 0.15
    assert max(abs(value - 1) for value in influence.values()) > 1

    def spread(kind: str) -> float:
        allocation = AdaCR(min_retention_gap=0.1, importance=kind, budget="water_filling")
        ranks = sizes(allocation(pairs_of(*units), 0.5, Cosines(cosine)))
        shares = [ranks[f"layers.{i}.q"] / break_even_rank(4096, 4096) for i in range(8)]
        return max(abs(share - 0.5) for share in shares)

    assert spread("cosine") < 0.015 < 0.1 < spread("block_influence")


def test_no_gap_is_uniform():
    units = decoder(LLAMA_7B, 4)
    ranks = adacr(units, [2.0, 1.0, 0.5, 0.5], 0.5, budget="raw", gap=0.0)
    assert ranks == sizes(UniformAllocation(exact_budget=False)(pairs_of(*units), 0.5, Refuse()))


# SVD-LLM V2.


@examples
@given(st.lists(st.floats(1.1, 1e8), min_size=1, max_size=12), st.floats(0.05, 0.9))
def test_bigger_losses_mean_smaller_removals_of_the_same_mean(losses, compression):
    removed = type_losses({unit(f"x{i}", 4, 4): loss for i, loss in enumerate(losses)}, compression)
    removed = {x.name: value for x, value in removed.items()}
    assert sum(removed.values()) / len(removed) == pytest.approx(compression)
    ordered = [removed[f"x{i}"] for i in sorted(range(len(losses)), key=lambda i: losses[i])]
    assert all(
        after <= before * (1 + 1e-12) for before, after in zip(ordered, ordered[1:], strict=False)
    )


def test_removals_are_inverse_to_the_logarithm_of_the_loss():
    a, b = unit("a", 4, 4), unit("b", 4, 4)
    removed = type_losses({a: math.e, b: math.e**3}, 0.4)
    assert [removed[a], removed[b]] == pytest.approx([0.6, 0.2])


@pytest.mark.parametrize("loss", [0.0, 0.5, 1.0])
def test_a_loss_of_one_or_less_is_refused_by_name(loss):
    said = r"layers\.1\.q loses only .* \(must exceed 1\): calibrate on more tokens"
    with pytest.raises(UserError, match=said) as caught:
        type_losses({unit("layers.0.q", 4, 4): 20.0, unit("layers.1.q", 4, 4): loss}, 0.4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", [0.2, 0.5, 0.8])
def test_type_loss_allocation_meets_the_budget_per_type(compression):
    units, trr = decoder(LLAMA_7B, 8), Numbers(compression=compression).retention
    # The deeper, the larger the loss, over seven orders of magnitude.
    values = {x.name: torch.full((4096,), 10.0 ** (x.decoder_layer - 1)) for x in units}
    allocation = TypeLossAllocation(max_compression=0.95, exact_budget=True)
    ranks = sizes(allocation(menu(units, values=values), trr, Refuse()))
    assert set(ranks) == {x.name for x in units}
    for kind in LLAMA_7B:
        group = [x for x in units if x.linears[0].kind == kind]
        assert kept(group, ranks) == pytest.approx(trr, rel=1e-3)
        assert kept(group, ranks) <= trr * (1 + 1e-12)
        by_depth = [ranks[x.name] for x in group]
        assert all(
            after >= before - 1 for before, after in zip(by_depth, by_depth[1:], strict=False)
        )
        assert by_depth[-1] > by_depth[0]
        assert min(by_depth) >= rank_of(*shape(group[0]), 0.05)


# ASVD.

A, B = PAIR = [unit("a", 100, 100), unit("b", 100, 100)]


def trial(loss: float, x: Unit, rank: int) -> tuple[float, Unit, int]:
    """Of an option, which of two factors stands at its rank less one."""
    return loss, x, rank - 1


# Perplexity or loss, unit, rank: at rank 25 half of a linear is kept, at 10 a fifth, at 40 most.
TRIALS = [
    trial(9.0, A, 10),
    trial(3.0, A, 25),
    trial(1.0, A, 40),
    trial(5.0, B, 10),
    trial(2.0, B, 25),
    trial(1.5, B, 40),
]


def cut_ranks(trials: list[tuple[float, Unit, int]], share: float) -> dict[str, int]:
    return ranks_at(PAIR, cut(trials, menu(PAIR), share))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (1.0, {"a": 100, "b": 100}),
        (0.9, {"a": 40, "b": 100}),
        (0.8, {"a": 40, "b": 40}),
        (0.65, {"a": 40, "b": 25}),
        (0.5, {"a": 25, "b": 25}),
        (0.35, {"a": 25, "b": 10}),
        (0.2, {"a": 10, "b": 10}),
    ],
)
def test_cut_applies_the_fewest_least_harmful_trials(target, expected):
    assert cut_ranks(TRIALS, target) == expected
    assert cut_ranks(TRIALS[::-1], target) == expected
    assert kept(PAIR, expected) <= target


def test_cut_never_undoes_a_deeper_cut():
    trials = [trial(1.0, A, 10), trial(2.0, A, 40), trial(3.0, B, 25)]
    assert cut_ranks(trials, 0.4) == {"a": 10, "b": 25}


def test_cut_tries_broken_models_last():
    broken = trial(float("nan"), A, 10)
    for trials in ([broken, *TRIALS[1:]], [*TRIALS[1:], broken]):
        assert cut_ranks(trials, 0.5) == {"a": 25, "b": 25}
        assert cut_ranks(trials, 0.2) == {"a": 10, "b": 10}


def test_cut_out_of_reach_is_refused_with_the_numbers():
    said = r"keep 0\.200 of the parameters, the target is 0\.100: .*allocation\.candidates"
    with pytest.raises(UserError, match=said):
        cut(TRIALS, menu(PAIR), 0.1)


def test_sensitivity_allocation_probes_each_candidate_once():
    probed = []

    class Probed(Refuse):
        def probe(self, x: Unit | None, choice: Choice | None) -> float:
            probed.append((x.name, choice.size))
            assert choice.form == PAIRS
            return {"a": 1.0, "b": 10.0}[x.name] / choice.size

    share = Numbers(compression=0.28).retention
    ranks = sizes(SensitivityAllocation(candidates=(0.5, 0.9))(menu(PAIR), share, Probed()))
    assert probed == [("a", 25), ("a", 45), ("b", 25), ("b", 45)]
    # Losses 1/45, 1/25, 10/45 leave 0.95, 0.75, 0.7 of the parameters.
    assert ranks == {"a": 25, "b": 45}


def test_messages_speak_the_currency_of_the_budget():
    found = menu(decoder({"k": (8, 64)}, 2), budget=Bits(bits=0.1))
    with pytest.raises(UserError, match=r"leaves rank 0; raise ratio\.bits"):
        floor(found, dict.fromkeys(found, 0.003))
    with pytest.raises(UserError, match=r"change ratio\.bits=0\.1 or"):
        water_fill(found, dict.fromkeys(found, 0.5), dict.fromkeys(found, 1.0), 0.1, 0.6)
