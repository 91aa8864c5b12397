"""Rounding one weight: the grid, round to nearest, and GPTQ against both its definition and brute
force.
"""

import math
from dataclasses import replace

import pytest
import torch
from problems import make
from torch import Tensor

from specomp.errors import UserError
from specomp.numerics.factors import GramNorm, LowRankFactors, truncate
from specomp.numerics.feedback import inverse_factor
from specomp.numerics.grid import Grid
from specomp.numerics.statistics import Gram, Stats
from specomp.quantization.factors import FactorQuantizer, rebalanced
from specomp.quantization.gptq import gptq
from specomp.quantization.none import NoQuantizer
from specomp.quantization.rtn import Spacing, round_to_nearest
from specomp.slots import Chain, Rounded, Rounding

SHAPES = [(24, 40), (40, 24), (7, 33)]
GROUPS = [None, 16, 8]


def spacing(**changes) -> Spacing:
    return Spacing(
        **{"bits": 4, "group_size": None, "symmetric": False, "scale_dtype": torch.float16}
        | changes
    )


def problem(m: int = 24, n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram of correlated inputs, both float32."""
    made = make(m, n, 1, seed, 4 * n)
    return made.W.float(), made.gram.float()


def loss(rounded, weight: Tensor, gram: Tensor) -> float:
    return GramNorm(gram.double()).loss((rounded.values() - weight).double())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_nearest_is_within_half_a_step_of_every_number(m, n, group_size, symmetric):
    weight, _ = problem(m, n)
    rounded = round_to_nearest(weight, spacing(group_size=group_size, symmetric=symmetric))
    grid = rounded.grid
    assert rounded.integers.shape == weight.shape and rounded.integers.dtype == torch.int8
    assert grid.scales.shape == (m, math.ceil(n / (group_size or n)))
    assert grid.scales.dtype == torch.float16
    assert (grid.zeros is None) is symmetric
    assert rounded.integers.min() >= -8 and rounded.integers.max() <= 7
    step = grid.scales.float().repeat_interleave(group_size or n, 1)[:, :n]
    # Half a step of the grid; half a step more at the positive end of a symmetric one, whose ends
    # are -8 and 7; and the rounded scale.
    assert ((rounded.values() - weight).abs() <= step * (1.02 if symmetric else 0.55) + 1e-6).all()


def test_the_grid_is_what_the_published_code_computes():
    """gptq/quant.py: scale (max - min) / 15, zero round(-min / scale), min <= 0 <= max; symmetric:
    the range is +-max|w|.
    """
    weight = torch.tensor([[-1.0, 0.5, 2.0, 0.1], [1.0, 2.0, 3.0, 1.5], [0.0, 0.0, 0.0, 0.0]])
    grid = spacing().fit(weight)
    assert torch.allclose(
        grid.scales.float().flatten(), torch.tensor([3 / 15, 3 / 15, 1.0]), rtol=1e-3
    )
    assert grid.zeros is not None
    assert (grid.zeros.flatten() + 8).tolist() == [5, 0, 0]
    symmetric = spacing(symmetric=True).fit(weight)
    assert torch.allclose(
        symmetric.scales.float().flatten(), torch.tensor([4 / 15, 6 / 15, 1.0]), rtol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_integers_are_recovered_from_values_held_in_the_dtype_of_a_model(dtype, bits):
    weight, gram = problem()
    scale_dtype = torch.float16 if dtype == torch.float32 else dtype
    rounded = gptq(
        weight,
        gram,
        spacing(bits=bits, group_size=16, scale_dtype=scale_dtype),
        act_order=True,
        damping=0.01,
    )
    held = rounded.values().to(dtype)
    integers = rounded.grid.integers(held)
    assert torch.equal(rounded.grid.values(integers).to(dtype), held)
    if bits < 8 or dtype != torch.bfloat16:  # there several integers are one number
        assert torch.equal(integers, rounded.integers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eight_bits_with_zeros_are_found_again_at_every_scale(dtype):
    """In bfloat16 the nearest integer to a held number may stand for another one."""
    torch.manual_seed(0)
    integers = torch.arange(-128, 128, dtype=torch.int8).repeat(400, 1)
    scales = (torch.rand(400, 1) * 0.1 + 1e-4).to(dtype)
    for zero in (-128, 0, 127):
        zeros = torch.full((400, 1), zero, dtype=torch.int8)
        grid = Grid(scales=scales, zeros=zeros, bits=8, group_size=256)
        held = grid.values(integers).to(dtype)
        assert torch.equal(grid.values(grid.integers(held)).to(dtype), held)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
def test_eight_bits_lose_nearly_nothing(group_size, act_order):
    weight, gram = problem()
    rounded = gptq(
        weight, gram, spacing(bits=8, group_size=group_size), act_order=act_order, damping=0.01
    )
    assert loss(rounded, weight, gram) < 0.01 * GramNorm(gram).loss(weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gptq_beats_the_nearest_on_the_outputs(m, n, group_size, act_order, symmetric):
    for seed in range(3):
        weight, gram = problem(m, n, seed)
        settings = spacing(group_size=group_size, symmetric=symmetric)
        rounded = gptq(weight, gram, settings, act_order=act_order, damping=0.01)
        assert rounded.integers.shape == weight.shape
        assert rounded.grid.scales.shape == settings.fit(weight).scales.shape
        assert loss(rounded, weight, gram) <= loss(round_to_nearest(weight, settings), weight, gram)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
def test_with_a_diagonal_gram_there_is_nothing_to_make_up_for(group_size, act_order):
    weight, gram = problem()
    settings = spacing(group_size=group_size)
    rounded = gptq(weight, torch.diag(gram.diagonal()), settings, act_order=act_order, damping=0.01)
    nearest = round_to_nearest(weight, settings)
    assert torch.equal(rounded.values(), nearest.values())


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_equals_its_definition(act_order):
    """Optimal brain quantization with a fixed order: after each column the rest minimizes the loss
    given what is rounded (Eq. 2).
    """
    weight, gram = problem(5, 12)
    settings = spacing()
    rounded = gptq(weight, gram, settings, act_order=act_order, damping=0.01)
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(
        12, dtype=torch.float64
    )
    order = gram.diagonal().argsort(descending=True).tolist() if act_order else list(range(12))
    grid, current, fixed = settings.fit(weight), weight.double(), []
    for j in order:
        column = grid.values(grid.integers(current.float()))[:, j].double()
        rest = [k for k in order if k not in fixed and k != j]
        delta = (column - current[:, j])[:, None]
        if rest:
            current[:, rest] -= (
                delta @ torch.linalg.solve(damped[rest][:, rest], damped[rest, j])[None]
            )
        current[:, j] = column
        fixed.append(j)
    assert torch.allclose(rounded.values().double(), current, atol=1e-4)


def test_the_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    _, gram = problem()
    gram = gram.double()
    factor, damping = inverse_factor(gram.clone(), 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(factor, expected, rtol=1e-9, atol=1e-12)
    assert damping == 0.01


def test_a_singular_gram_gets_the_damping_it_needs_and_it_is_reported():
    weight, _ = problem()
    gram = torch.ones(40, 40)
    asked = gptq(weight, gram, spacing(), act_order=False, damping=0.01)
    needed = gptq(weight, gram, spacing(), act_order=False, damping=0.0)
    assert asked.damping == 0.01
    assert 0 < needed.damping <= 1e-3
    assert torch.isfinite(needed.values()).all()


def test_inputs_that_never_occur_are_rounded_to_zero_and_disturb_nothing():
    weight, gram = problem()
    gram[:, 3] = gram[3] = 0
    rounded = gptq(weight, gram, spacing(), act_order=True, damping=0.01)
    assert (rounded.values()[:, 3] == 0).all()
    others = [j for j in range(40) if j != 3]
    alone = gptq(
        weight[:, others], gram[others][:, others], spacing(), act_order=True, damping=0.01
    )
    assert loss(rounded, weight, gram) == pytest.approx(
        loss(alone, weight[:, others], gram[others][:, others]), rel=0.05
    )


def test_what_is_not_finite_is_refused():
    weight, gram = problem()
    with pytest.raises(UserError, match="not finite"):
        round_to_nearest(weight * float("inf"), spacing())
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(weight, gram * float("nan"), spacing(), act_order=False, damping=0.01)


def quantizer(**changes) -> FactorQuantizer:
    settings = {
        "algorithm": "gptq",
        "bits": 4,
        "group_size": 16,
        "symmetric": True,
        "act_order": True,
        "damping": 0.01,
    }
    return FactorQuantizer(**settings | {"order": "faithful", "rebalance": False} | changes)


def factors(rank: int = 21) -> tuple[LowRankFactors, Stats]:
    """Unbalanced factors of a 24 x 40 weight, and the statistics of its inputs."""
    made = make(24, 40, rank, 1, 200)
    U, s, Vt = torch.linalg.svd(made.W.float(), full_matrices=False)
    return LowRankFactors(U[:, :rank] * s[:rank] * torch.logspace(0, 1, rank), Vt[:rank]), Stats(
        {Gram(): made.gram.float()}
    )


def multiplied(*matrices: Tensor) -> Tensor:
    return torch.linalg.multi_dot(matrices[::-1])


def pair(exact: LowRankFactors, *, free_basis: bool) -> Chain:
    return Chain((exact.Vt, exact.U), multiplied, free_basis=free_basis)


def pair_rounded(
    exact: LowRankFactors,
    stats: Stats,
    dtype: torch.dtype = torch.float32,
    *,
    by: Rounding | None = None,
    **changes,
) -> tuple[Rounded, Rounded]:
    """(Vt, U), as a form of two factors has them rounded."""
    by = by or quantizer(**changes)
    return by(pair(exact, free_basis=True), stats, dtype)


def product_loss(found: tuple[Rounded, Rounded], exact: LowRankFactors, stats: Stats) -> float:
    Vt, U = found
    return GramNorm(stats[Gram()].double()).loss((U.values @ Vt.values - exact.product()).double())


def test_factors_are_rounded_each_with_what_it_sees():
    exact, stats = factors()
    Vt, U = pair_rounded(exact, stats)
    G, V = stats[Gram()].double(), exact.Vt.double().T
    for part, weight, gram in ((U, exact.U, V.T @ G @ V), (Vt, exact.Vt, G)):
        alone = gptq(
            weight, gram, spacing(group_size=16, symmetric=True), act_order=True, damping=0.01
        )
        assert torch.allclose(part.values, alone.values(), atol=1e-5)
        assert part.damping == 0.01
        assert part.values.dtype == torch.float32
        assert torch.equal(part.grid.values(part.grid.integers(part.values)), part.values)
    assert U.grid.scales.shape == (24, 2) and Vt.grid.scales.shape == (21, 3)
    assert U.grid.spec == Vt.grid.spec == quantizer().grid


def test_a_matrix_alone_and_a_chain_of_three_see_what_comes_before():
    """Whatever is applied one after the other: the first sees the inputs, each other one what the
    one before gives.
    """
    exact, stats = factors()
    third = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    chain = (exact.Vt, exact.U, third)
    found = quantizer()(Chain(chain, multiplied), stats, torch.float32)
    alone = quantizer()(Chain((exact.Vt,), multiplied), stats, torch.float32)
    assert torch.equal(found[0].values, alone[0].values)
    seen = stats[Gram()].double()
    for part, weight in zip(found, chain, strict=True):
        expected = gptq(
            weight, seen, spacing(group_size=16, symmetric=True), act_order=True, damping=0.01
        )
        assert torch.allclose(part.values, expected.values(), atol=1e-5)
        seen = weight.double() @ seen @ weight.double().T


def test_only_a_free_basis_is_rebalanced():
    """Pivot rows and coefficients are what they are: in another basis they would be other rows."""
    exact, stats = factors()
    settings = {"algorithm": "rtn", "rebalance": True}
    free = pair_rounded(exact, stats, **settings)
    fixed = quantizer(**settings)(pair(exact, free_basis=False), stats, torch.float32)
    plain = pair_rounded(exact, stats, algorithm="rtn")
    assert all(torch.equal(a.values, b.values) for a, b in zip(fixed, plain, strict=True))
    assert not torch.equal(free[0].values, plain[0].values)
    best = pair_rounded(rebalanced(exact), stats, algorithm="rtn")
    assert all(torch.equal(a.values, b.values) for a, b in zip(free, best, strict=True))


def test_whitened_factors_leave_gptq_nothing_to_do_for_u():
    """Components that are orthogonal in the Gram norm do not mix: the Hessian of U is diagonal."""
    made = make(24, 40, 11, 1, 200)
    exact, stats = truncate(GramNorm(made.gram).decompose(made.W), 11), Stats({Gram(): made.gram})
    (Vt, U), (nearest_Vt, nearest_U) = (
        pair_rounded(exact, stats, algorithm=x) for x in ("gptq", "rtn")
    )
    assert torch.equal(U.values, nearest_U.values)
    assert not torch.equal(Vt.values, nearest_Vt.values)


def test_sequential_shows_u_what_the_rounded_vt_gives():
    exact, stats = factors()
    faithful, sequential = (pair_rounded(exact, stats, order=x) for x in ("faithful", "sequential"))
    assert torch.equal(faithful[0].values, sequential[0].values)
    assert not torch.equal(faithful[1].values, sequential[1].values)


def test_rebalanced_factors_have_the_same_product_and_equal_sides():
    exact, _ = factors()
    found = rebalanced(exact)
    assert torch.allclose(found.product(), exact.product(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.U.norm(dim=0), found.Vt.norm(dim=1), rtol=1e-4)
    left = found.U.T @ found.U
    assert torch.allclose(
        left, torch.diag(left.diagonal()), atol=1e-3 * float(left.diagonal().max())
    )
    assert (left.diagonal().diff() <= 1e-3).all()


@pytest.mark.parametrize("rebalance", [True, False])
def test_gptq_of_factors_beats_the_nearest(rebalance):
    exact, stats = factors()
    found = {
        x: pair_rounded(exact, stats, algorithm=x, rebalance=rebalance) for x in ("gptq", "rtn")
    }
    assert product_loss(found["gptq"], exact, stats) < product_loss(found["rtn"], exact, stats)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_scales_are_in_the_16_bits_of_the_model(dtype, expected):
    exact, stats = factors()
    assert {x.grid.scales.dtype for x in pair_rounded(exact, stats, dtype)} == {expected}


def test_only_gptq_needs_inputs():
    assert quantizer().needs == {Gram()}
    assert quantizer(algorithm="rtn").needs == frozenset()
    exact, _ = factors()
    for part in pair_rounded(exact, Stats({}), algorithm="rtn"):
        assert part.grid is not None
        assert part.damping == 0


def test_without_a_quantizer_every_number_stays():
    exact, _ = factors()
    assert NoQuantizer().grid is None and NoQuantizer().needs == frozenset()
    Vt, U = pair_rounded(exact, Stats({}), by=NoQuantizer())
    assert Vt.values is exact.Vt and U.values is exact.U
    assert [(x.grid, x.damping) for x in (Vt, U)] == [(None, 0), (None, 0)]


def test_more_damping_than_asked_for_is_said():
    assert quantizer().notes([0.01, 0.01]) == []
    (note,) = quantizer().notes([0.01, 0.011, 0.02])
    assert note.startswith("GPTQ of 2 linears needed more damping than 0.01, at most 2.0e-02")


# The search for the range of a group.


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
def test_a_search_finds_the_range_of_least_error_among_those_it_tries(group_size, symmetric):
    """By hand: every group at every range, each column counted by its energy."""
    weight, gram = problem()
    energy, settings = gram.diagonal(), spacing(bits=3, group_size=group_size, symmetric=symmetric)
    found = replace(settings, search=4).fit(weight, energy)
    size = found.group_size
    widest = settings.fit(weight)
    for row in range(3):
        for group, start in enumerate(range(0, weight.shape[1], size)):
            part = weight[row : row + 1, start : start + size]
            counts = energy[start : start + size]
            errors = {}
            for share in (1, 0.875, 0.75, 0.625, 0.5):
                span = torch.cat([part * share, part.new_zeros(1, 1)], 1)  # the range it spans
                grid = settings.fit(span)
                grid = replace(grid, group_size=part.shape[1])
                near = grid.values(grid.integers(part))
                errors[float(grid.scales[0, 0])] = float(((near - part) ** 2 * counts).sum())
            best = min(errors.values())
            chosen = float(found.scales[row, group])
            assert errors[chosen] == pytest.approx(best, rel=1e-4)
            assert chosen <= float(widest.scales[row, group])


def test_without_a_search_the_range_is_the_widest():
    weight, gram = problem()
    plain, none = spacing().fit(weight), replace(spacing(), search=0).fit(weight, gram.diagonal())
    assert torch.equal(plain.scales, none.scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_search_never_loses_more_to_the_nearest(bits, symmetric):
    for seed in range(3):
        weight, _ = problem(24, 40, seed)
        settings = spacing(bits=bits, group_size=16, symmetric=symmetric)
        plain, searched = (
            (round_to_nearest(weight, replace(settings, search=x)).values() - weight).norm()
            for x in (0, 6)
        )
        assert searched <= plain
        assert searched < 0.97 * plain or bits > 2


@pytest.mark.parametrize("act_order", [True, False])
def test_a_search_helps_gptq_at_two_bits(act_order):
    weight, gram = problem(64, 128)
    lost = [
        loss(gptq(weight, gram, kind, act_order=act_order, damping=0.01), weight, gram)
        for kind in (replace(spacing(bits=2, group_size=64), search=x) for x in (0, 6))
    ]
    assert lost[1] < 0.9 * lost[0]
