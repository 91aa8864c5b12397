"""Ranks that meet a parameter budget: the shared rounding and water-filling, and the allocations of AdaSVD, SVD-LLM V2 and ASVD."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specomp.forms.options import fill_ranks, floor_ranks, full_rank, stored, water_fill
from specomp.errors import UserError
from specomp.numerics.factors import Spectrum
from specomp.methods.adasvd import AdaCR, normalized_importance
from specomp.methods.asvd import SensitivityAllocation, cut
from specomp.methods.svd import FullRank, UniformAllocation
from specomp.methods.svd_llm import TypeLossAllocation, type_losses
from specomp.models.family import LinearSpec
from specomp.numerics.ratio import Ratio, pair_cost, rank_for_retention
from specomp.numerics.statistics import IOCosine, Stats

examples = settings(deadline=None, max_examples=60, derandomize=True, database=None)

LLAMA_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
LLAMA_7B |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
OPT_6_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096), "fc1": (16384, 4096), "fc2": (4096, 16384)}
# Largest and smallest normalized importance of a decoder layer, read off AdaSVD's Figure 4.
PUBLISHED = [(LLAMA_7B, 3.320, 0.350), (OPT_6_7B, 16.754, 0.043)]


def linear(name: str, m: int, n: int, *, decoder_layer: int = 0, kind: str = "q") -> LinearSpec:
    return LinearSpec(name, m, n, decoder_layer, 0, kind)


def decoder(shapes: dict[str, tuple[int, int]], count: int) -> list[LinearSpec]:
    return [linear(f"layers.{i}.{kind}", m, n, decoder_layer=i, kind=kind) for i in range(count) for kind, (m, n) in shapes.items()]


def kept(linears: list[LinearSpec], ranks: dict[str, int]) -> float:
    """Stored over dense parameters, counted without the code under test."""
    total = 0
    for x in linears:
        pair = ranks[x.name] * (x.m + x.n)
        total += min(pair, x.m * x.n)
    return total / sum(x.m * x.n for x in linears)


def refuse(*_):
    raise AssertionError("not needed by this allocation")


@st.composite
def wishes(draw) -> tuple[list[LinearSpec], dict[str, float], float]:
    """Linears of mixed sizes with retentions around, and on average equal to, a target."""
    count = draw(st.integers(1, 8))
    linears = [linear(f"x{i}", draw(st.integers(40, 400)), draw(st.integers(40, 400))) for i in range(count)]
    target = draw(st.floats(0.2, 0.9))
    base = {x.name: draw(st.floats(0.15, 1.2)) for x in linears}
    return linears, water_fill(linears, base, dict.fromkeys(base, 1.0), target, 0.1), target


# Rounding.


def test_stored_is_the_cheaper_of_factors_and_dense():
    x = linear("x", 30, 60)  # break-even at 20
    assert [stored(x, rank) for rank in (0, 1, 19, 20, 30)] == [0, 90, 1710, 1800, 1800]
    assert full_rank(x) == 30


def test_floor_of_the_wish_or_dense():
    linears = [linear("a", 100, 100), linear("b", 100, 300), linear("c", 10, 20)]
    assert floor_ranks(linears, {"a": 0.5, "b": 0.999, "c": 1.7}) == {"a": 25, "b": 74, "c": 10}


def test_rank_zero_is_refused_by_name():
    with pytest.raises(UserError, match=r"layers\.3\.k \(8 x 64\): a retention of 0\.1 leaves rank 0; lower ratio\.compression") as caught:
        floor_ranks([linear("layers.2.q", 64, 64), linear("layers.3.k", 8, 64)], {"layers.2.q": 0.1, "layers.3.k": 0.1})
    assert "\n" not in str(caught.value)


@examples
@given(wishes())
def test_filling_never_exceeds_the_budget_and_ends_within_one_rank(wish):
    linears, retention, target = wish
    ranks, floors = fill_ranks(linears, retention, target), floor_ranks(linears, retention)
    budget = target * sum(x.params for x in linears)
    used = sum(stored(x, ranks[x.name]) for x in linears)
    assert used <= budget * (1 + 1e-9)
    assert budget - used < max(x.m + x.n for x in linears)
    assert all(0 <= ranks[x.name] - floors[x.name] <= 1 for x in linears)
    for x in linears:  # whoever got nothing could not be afforded
        if ranks[x.name] == floors[x.name] and stored(x, ranks[x.name]) < x.params:
            assert used + stored(x, ranks[x.name] + 1) - stored(x, ranks[x.name]) > budget


def test_filling_starts_where_the_floor_took_the_most():
    linears = [linear("a", 100, 100), linear("b", 100, 100), linear("c", 100, 100)]
    wish = {"a": 0.404, "b": 0.418, "c": 0.408}  # ranks 20.2, 20.9, 20.4
    assert fill_ranks(linears, wish, 0.407) == {"a": 20, "b": 21, "c": 20}
    assert fill_ranks(linears, wish, 0.414) == {"a": 20, "b": 21, "c": 21}


@pytest.mark.parametrize("compression", [0.2, 0.4, 0.6, 0.8])
def test_uniform_allocation(compression):
    linears, ratio = decoder(LLAMA_7B, 4), Ratio(compression=compression)
    published = UniformAllocation(exact_budget=False)(linears, ratio, refuse, refuse, pair_cost, refuse)
    assert published == {x.name: rank_for_retention(x.m, x.n, ratio.retention) for x in linears}
    exact = UniformAllocation(exact_budget=True)(linears, ratio, refuse, refuse, pair_cost, refuse)
    assert kept(linears, published) <= kept(linears, exact) <= ratio.retention * (1 + 1e-12)
    assert kept(linears, exact) == pytest.approx(ratio.retention, abs=1e-5)


def test_full_rank_keeps_everything():
    linears = decoder(LLAMA_7B, 2)
    assert kept(linears, FullRank()(linears, Ratio(compression=0.5), refuse, refuse, pair_cost, refuse)) == 1


# Water-filling.


@examples
@given(wishes(), st.integers(0, 999))
def test_water_filling_meets_the_target_within_its_bounds(wish, seed):
    linears, _, target = wish
    generator = torch.Generator().manual_seed(seed)
    slope = {x.name: float(torch.rand(1, generator=generator)) + 0.01 for x in linears}
    base = {x.name: 0.3 * float(torch.rand(1, generator=generator)) for x in linears}
    shares = water_fill(linears, base, slope, target, 0.1)
    assert sum(x.params * shares[x.name] for x in linears) / sum(x.params for x in linears) == pytest.approx(target, rel=1e-9)
    assert all(0.1 <= share <= 1 for share in shares.values())
    free = [(shares[name] - base[name]) / slope[name] for name in shares if 0.1 < shares[name] < 1]
    assert all(level == pytest.approx(free[0], rel=1e-6, abs=1e-9) for level in free)  # one level for all that are not clipped


@pytest.mark.parametrize("compression", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
def test_a_floor_at_the_target_itself_is_uniform(compression):
    """mrr = trr, the end of AdaSVD's Table 3d: the mean over SmolLM2's linears may come out one rounding above the target."""
    shapes = {
        "q": (576, 576),
        "k": (192, 576),
        "v": (192, 576),
        "o": (576, 576),
        "gate": (1536, 576),
        "up": (1536, 576),
        "down": (576, 1536),
    }
    linears, target = decoder(shapes, 30), 1 - compression
    shares = water_fill(linears, {x.name: target for x in linears}, {x.name: 1.0 + x.decoder_layer for x in linears}, target, target)
    assert all(share == pytest.approx(target) for share in shares.values())


def test_water_filling_without_a_solution_is_refused():
    linears = [linear("a", 50, 50), linear("b", 50, 50)]
    with pytest.raises(UserError, match=r"No allocation with retentions in \[0\.6, 1\] averages 0\.5: change ratio\.compression"):
        water_fill(linears, {"a": 0.6, "b": 0.6}, {"a": 1.0, "b": 1.0}, 0.5, 0.6)
    with pytest.raises(UserError, match="averages 0.9"):
        water_fill(linears, {"a": 0.2, "b": 0.2}, {"a": 0.0, "b": 1.0}, 0.9, 0.1)


# AdaSVD.


def importances(count: int, most: float, least: float) -> list[float]:
    """Mean 1: the first decoder layer is the most important, one is the least, the others share the rest."""
    return [most, least] + [(count - most - least) / (count - 2)] * (count - 2)


def adacr(linears, importance: list[float], compression: float, *, budget: str = "water_filling", kind: str = "block_influence", gap=0.1):
    """Ranks, from the cosines that have this importance."""
    scale = 0.9 / max(importance)
    cosine = [1 - scale * x for x in importance]
    layer = {x.name: x.decoder_layer for x in linears}

    def stats(name: str) -> Stats:
        return Stats({IOCosine(): torch.tensor(cosine[layer[name]], dtype=torch.float64)})

    allocation = AdaCR(min_retention_gap=gap, importance=kind, budget=budget)
    return allocation(linears, Ratio(compression=compression), stats, refuse, pair_cost, refuse)


def test_importance_has_mean_one():
    cosine = {0: 0.2, 1: 0.9, 2: 0.7}
    assert normalized_importance(cosine, "block_influence") == pytest.approx({0: 2.0, 1: 0.25, 2: 0.75})
    assert normalized_importance(cosine, "cosine") == pytest.approx({0: 1 / 3, 1: 1.5, 2: 7 / 6})


@pytest.mark.parametrize("compression", [0.4, 0.5, 0.6])
def test_equation_20_keeps_the_mean_where_nothing_is_clipped(compression):
    importance = importances(32, 3.320, 0.350)
    trr, gap = Ratio(compression=compression).retention, 0.05
    printed = [trr - gap + i * gap for i in importance]
    assert sum(printed) / 32 == pytest.approx(trr)
    assert max(printed) < 1
    linears = decoder(LLAMA_7B, 32)
    level = water_fill(
        linears, {x.name: trr - gap for x in linears}, {x.name: importance[x.decoder_layer] for x in linears}, trr, trr - gap
    )
    assert [level[f"layers.{i}.q"] for i in range(32)] == pytest.approx(printed, rel=1e-9)
    raw = adacr(linears, importance, compression, budget="raw", gap=gap)
    assert raw == {x.name: rank_for_retention(x.m, x.n, printed[x.decoder_layer]) for x in linears}
    filled = adacr(linears, importance, compression, gap=gap)
    assert all(0 <= filled[name] - raw[name] <= 1 for name in raw)


@pytest.mark.parametrize(("shapes", "most", "least"), PUBLISHED)
@pytest.mark.parametrize("compression", [0.4, 0.5, 0.6, 0.7, 0.8])
def test_adacr_meets_the_budget_for_the_published_importances(shapes, most, least, compression):
    linears, ratio = decoder(shapes, 32), Ratio(compression=compression)
    importance = importances(32, most, least)
    ranks = adacr(linears, importance, compression)
    assert ratio.retention * (1 - 1e-3) <= kept(linears, ranks) <= ratio.retention * (1 + 1e-12)
    mrr = ratio.retention - 0.1
    for x in linears:
        assert rank_for_retention(x.m, x.n, mrr) <= ranks[x.name] <= full_rank(x)
    # More important decoder layers never get less.
    order = sorted(range(32), key=lambda i: importance[i])
    for kind in shapes:
        by_importance = [ranks[f"layers.{i}.{kind}"] for i in order]
        assert all(after >= before - 1 for before, after in zip(by_importance, by_importance[1:], strict=False))
        assert by_importance[-1] > by_importance[0]


def test_adacr_keeps_an_all_important_decoder_layer_dense():
    linears = decoder(OPT_6_7B, 32)
    ranks = adacr(linears, importances(32, 16.754, 0.043), 0.6)  # Eq. 20 asks for 1.975 here
    assert all(ranks[x.name] == full_rank(x) for x in linears if x.decoder_layer == 0)
    # Unclipped elsewhere: the published equation keeps too little once the first decoder layer cannot keep more than everything.
    raw = adacr(linears, importances(32, 16.754, 0.043), 0.6, budget="raw")
    assert kept(linears, raw) < 0.4 * 0.95
    assert kept(linears, ranks) == pytest.approx(0.4, rel=1e-3)


def test_raw_equation_20_misses_the_budget_where_decoder_layers_differ_in_size():
    linears = [linear("a", 1000, 1000, decoder_layer=0), linear("b", 3000, 3000, decoder_layer=1)]
    assert kept(linears, adacr(linears, [1.5, 0.5], 0.6, budget="raw")) == pytest.approx((0.45 + 9 * 0.35) / 10, abs=1e-3)
    assert kept(linears, adacr(linears, [1.5, 0.5], 0.6)) == pytest.approx(0.4, rel=1e-3)


def test_cosine_as_printed_barely_differs_from_uniform():
    linears = decoder(LLAMA_7B, 8)
    importance = [0.2, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05, 0.1]  # 1 - cos, before adacr's helper scales them to 0.9 at most
    cosine = {i: 1 - value for i, value in enumerate(importance)}
    printed, influence = (normalized_importance(cosine, kind) for kind in ("cosine", "block_influence"))
    assert max(abs(value - 1) for value in printed.values()) < 0.15
    assert max(abs(value - 1) for value in influence.values()) > 1

    def spread(kind: str) -> float:
        stats = {x.name: Stats({IOCosine(): torch.tensor(cosine[x.decoder_layer], dtype=torch.float64)}) for x in linears}
        allocation = AdaCR(min_retention_gap=0.1, importance=kind, budget="water_filling")
        ranks = allocation(linears, Ratio(compression=0.5), stats.__getitem__, refuse, pair_cost, refuse)
        shares = [ranks[f"layers.{i}.q"] / 2048 for i in range(8)]
        return max(abs(share - 0.5) for share in shares)

    assert spread("cosine") < 0.015 < 0.1 < spread("block_influence")


def test_no_gap_is_uniform():
    linears = decoder(LLAMA_7B, 4)
    ranks = adacr(linears, [2.0, 1.0, 0.5, 0.5], 0.5, budget="raw", gap=0.0)
    assert ranks == UniformAllocation(exact_budget=False)(linears, Ratio(compression=0.5), refuse, refuse, pair_cost, refuse)


# SVD-LLM V2.


@examples
@given(st.lists(st.floats(1.1, 1e8), min_size=1, max_size=12), st.floats(0.05, 0.9))
def test_bigger_losses_mean_smaller_removals_of_the_same_mean(losses, compression):
    removed = type_losses({f"x{i}": loss for i, loss in enumerate(losses)}, compression)
    assert sum(removed.values()) / len(removed) == pytest.approx(compression)
    ordered = [removed[f"x{i}"] for i in sorted(range(len(losses)), key=lambda i: losses[i])]
    assert all(after <= before * (1 + 1e-12) for before, after in zip(ordered, ordered[1:], strict=False))


def test_removals_are_inverse_to_the_logarithm_of_the_loss():
    removed = type_losses({"a": math.e, "b": math.e**3}, 0.4)
    assert removed == pytest.approx({"a": 0.6, "b": 0.2})


@pytest.mark.parametrize("loss", [0.0, 0.5, 1.0])
def test_a_loss_of_one_or_less_is_refused_by_name(loss):
    with pytest.raises(UserError, match=r"layers\.1\.q loses only .* \(must exceed 1\): calibrate on more tokens") as caught:
        type_losses({"layers.0.q": 20.0, "layers.1.q": loss}, 0.4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", [0.2, 0.5, 0.8])
def test_type_loss_allocation_meets_the_budget_per_type(compression):
    linears, ratio = decoder(LLAMA_7B, 8), Ratio(compression=compression)

    def spectra(name: str) -> Spectrum:
        # The deeper, the larger the loss, over five orders of magnitude.
        return Spectrum(torch.empty(0), torch.full((4096,), 10.0 ** (int(name.split(".")[1]) - 1)), torch.empty(0))

    allocation = TypeLossAllocation(max_compression=0.95, exact_budget=True)
    ranks = allocation(linears, ratio, refuse, spectra, pair_cost, refuse)
    assert set(ranks) == {x.name for x in linears}
    for kind in LLAMA_7B:
        group = [x for x in linears if x.kind == kind]
        assert kept(group, ranks) == pytest.approx(ratio.retention, rel=1e-3)
        assert kept(group, ranks) <= ratio.retention * (1 + 1e-12)
        by_depth = [ranks[x.name] for x in group]
        assert all(after >= before - 1 for before, after in zip(by_depth, by_depth[1:], strict=False))
        assert by_depth[-1] > by_depth[0]
        assert min(by_depth) >= rank_for_retention(group[0].m, group[0].n, 0.05)


# ASVD.

PAIR = [linear("a", 100, 100), linear("b", 100, 100)]
# (perplexity or loss, linear, rank): at rank 25 half of a linear is kept, at 10 a fifth, at 40 four fifths.
TRIALS = [(9.0, PAIR[0], 10), (3.0, PAIR[0], 25), (1.0, PAIR[0], 40), (5.0, PAIR[1], 10), (2.0, PAIR[1], 25), (1.5, PAIR[1], 40)]


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
    assert cut(TRIALS, PAIR, target) == expected
    assert cut(TRIALS[::-1], PAIR, target) == expected
    assert kept(PAIR, expected) <= target


def test_cut_never_undoes_a_deeper_cut():
    assert cut([(1.0, PAIR[0], 10), (2.0, PAIR[0], 40), (3.0, PAIR[1], 25)], PAIR, 0.4) == {"a": 10, "b": 25}


def test_cut_tries_broken_models_last():
    nan = float("nan")
    for trials in ([(nan, PAIR[0], 10), *TRIALS[1:]], [*TRIALS[1:], (nan, PAIR[0], 10)]):
        assert cut(trials, PAIR, 0.5) == {"a": 25, "b": 25}
        assert cut(trials, PAIR, 0.2) == {"a": 10, "b": 10}


def test_cut_out_of_reach_is_refused_with_the_numbers():
    with pytest.raises(UserError, match=r"keep 0\.200 of the parameters, the target is 0\.100: .*allocation\.candidates"):
        cut(TRIALS, PAIR, 0.1)


def test_sensitivity_allocation_probes_each_candidate_once():
    probed = []

    def probe(name: str, rank: int) -> float:
        probed.append((name, rank))
        return {"a": 1.0, "b": 10.0}[name] / rank

    ranks = SensitivityAllocation(candidates=(0.5, 0.9))(PAIR, Ratio(compression=0.28), refuse, refuse, pair_cost, probe)
    assert probed == [("a", 25), ("a", 45), ("b", 25), ("b", 45)]
    assert ranks == {"a": 25, "b": 45}  # losses 1/45, 1/25, 10/45 leave 0.95, 0.75, 0.7 of the parameters
