"""Pivoted packing: exact at fewer numbers, well conditioned, stored and counted as what it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor, nn
from units import Known, unit

from specomp.compression.ledger import measure
from specomp.forms.factors import Factors
from specomp.forms.pivoted import Pivoted, PivotedLinear, pivot_rows
from specomp.forms.prices import numbers
from specomp.models.families import family_of
from specomp.models.modules import Substitute, replace_linear
from specomp.numerics.factors import LowRankFactors
from specomp.slots import Form

PACK = Pivoted(max_growth=1.5)
examples = settings(deadline=None, max_examples=60, derandomize=True, database=None)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(
    form: Form,
    U: Tensor,
    Vt: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    bias: Tensor | None = None,
) -> Substitute:
    """What a form makes of these factors."""
    x = unit("x", len(U), Vt.shape[1])
    evidence = Known(pair=LowRankFactors(U, Vt), own_bias=bias, dtype=dtype)
    return form.fit(x, U.shape[1], evidence)["x"]


def pack(
    U: Tensor, Vt: Tensor, *, dtype: torch.dtype = torch.float64, bias: bool = False
) -> PivotedLinear:
    own = randn(len(U), seed=7).to(dtype) if bias else None
    packed = stored(PACK, U, Vt, dtype=dtype, bias=own)
    assert isinstance(packed, PivotedLinear)
    assert (packed.bias is None) is (own is None)
    assert own is None or torch.equal(packed.bias, own)
    return packed


@st.composite
def factors(draw) -> tuple[Tensor, Tensor]:
    m, n = draw(st.integers(2, 40)), draw(st.integers(1, 40))
    rank, seed = draw(st.integers(1, min(m - 1, n))), draw(st.integers(0, 999))
    # Components of very unequal size, as factors of activations are.
    U = randn(m, rank, seed=seed) * torch.logspace(
        0, -draw(st.integers(0, 7)), rank, dtype=torch.float64
    )
    return U, randn(rank, n, seed=seed + 1)


@examples
@given(factors())
def test_exact_in_as_many_numbers_as_there_are_degrees_of_freedom(pair):
    U, Vt = pair
    (m, rank), n = U.shape, Vt.shape[1]
    packed = pack(U, Vt)
    assert float((packed.merged_weight() - U @ Vt).norm()) <= 1e-12 * float((U @ Vt).norm())
    count = sum(p.numel() for p in packed.parameters())
    assert count == rank * (m + n - rank) == numbers(PACK.parts(unit("x", m, n), rank))
    assert packed.growth() <= 1.5
    assert PACK.facts(packed) == {"growth": packed.growth()}
    assert sorted(packed.order.tolist()) == list(range(m))


@examples
@given(factors())
def test_every_component_is_kept_to_its_own_precision(pair):
    """Small components matter where inputs excite them: W' has exactly the rows of Vt."""
    U, Vt = pair
    packed = pack(U, torch.eye(U.shape[1], dtype=torch.float64))
    assert bool(((packed.merged_weight() - U).norm(dim=0) <= 1e-11 * float(U.norm())).all())


@pytest.mark.parametrize("kind", ["zero", "twice", "all_zero"])
def test_columns_that_depend_on_each_other(kind):
    U, Vt = randn(12, 5), randn(5, 9, seed=1)
    U[:, 2] = 0 if kind == "zero" else U[:, 1]
    if kind == "all_zero":
        U[:] = 0
    packed = pack(U, Vt)
    assert bool(packed.merged_weight().isfinite().all())
    torch.testing.assert_close(packed.merged_weight(), U @ Vt, rtol=0, atol=1e-12)
    assert packed.growth() <= 1.5


@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_merged_weight(bias):
    packed = pack(randn(11, 4), randn(4, 7, seed=1), bias=bias)
    x = randn(3, 5, 7, seed=2)
    expected = nn.functional.linear(x, packed.merged_weight(), packed.bias)
    torch.testing.assert_close(packed(x), expected)
    assert (packed.in_features, packed.out_features, packed.rank) == (7, 11, 4)
    assert f"rank=4, bias={bias}" in repr(packed)


@pytest.mark.parametrize("m", [40, 400])
def test_low_precision_costs_about_what_it_costs_two_factors(m):
    U, Vt = randn(m, m // 4), randn(m // 4, 60, seed=1)
    errors = {}
    for form in (Factors(), PACK):
        weight = stored(form, U, Vt, dtype=torch.bfloat16).merged_weight().double()
        errors[type(form).__name__] = float((weight - U @ Vt).norm() / (U @ Vt).norm())
    assert errors["Pivoted"] <= 4 * errors["Factors"] <= 0.02


def test_lu_alone_would_grow_and_exchanges_do_not():
    """Kahan-like rows: |C| of partial pivoting grows with the rank."""
    rank = 12
    lower = torch.eye(rank, dtype=torch.float64) - torch.ones(rank, rank, dtype=torch.float64).tril(
        -1
    )
    U = torch.cat([lower, torch.ones(3, rank, dtype=torch.float64)])
    for limit in (1.01, 1.5, 4.0):
        pivots, others, C = pivot_rows(U, limit)
        assert float(C.abs().max()) <= limit + 1e-9
        torch.testing.assert_close(C @ U[pivots], U[others], rtol=0, atol=1e-12)


def test_independent_of_the_basis():
    U, R = randn(20, 6), randn(6, 6, seed=1)
    one, other = pivot_rows(U, 1.05), pivot_rows(U @ R, 1.05)
    for pivots, others, C in (one, other):
        torch.testing.assert_close(C @ U[pivots], U[others], rtol=0, atol=1e-11)


def test_state_is_two_matrices_and_an_index():
    packed = pack(randn(8, 3).float(), randn(3, 6).float(), dtype=torch.bfloat16, bias=True)
    state = packed.state_dict()
    assert {name: (tuple(x.shape), x.dtype) for name, x in state.items()} == {
        "pivots.weight": ((3, 6), torch.bfloat16),
        "others.weight": ((5, 3), torch.bfloat16),
        "bias": ((8,), torch.bfloat16),
        "order": ((8,), torch.int32),
    }
    empty = PivotedLinear(6, 8, 3, bias=True, dtype=torch.bfloat16)
    empty.load_state_dict(state)
    assert torch.equal(empty.merged_weight(), packed.merged_weight())


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_ledger_counts_the_index_in_bytes(name):
    model = tiny_model(name)
    linears = family_of(model.config).linears(model)
    before, x = measure(model, linears), linears[0]
    bias = model.get_submodule(x.name).bias
    packed = stored(PACK, randn(x.m, 3), randn(3, x.n), dtype=torch.float32, bias=bias)
    replace_linear(model, x.name, packed)
    after, saved = measure(model, linears), x.m * x.n - 3 * (x.m + x.n - 3)
    assert (
        before.linear_params - after.linear_params
        == before.model_params - after.model_params
        == saved
    )
    assert before.macs_per_token - after.macs_per_token == saved
    assert before.model_bytes - after.model_bytes == 4 * saved - 4 * x.m
    assert before.linear_bits - after.linear_bits == 8 * (4 * saved - 4 * x.m)
    state = {value.data_ptr(): value for value in model.state_dict().values()}.values()
    assert after.model_bytes == sum(value.numel() * value.element_size() for value in state)
    assert [y.name for y in family_of(model.config).linears(model)] == [y.name for y in linears]


def test_a_note_says_how_large_the_coefficients_became():
    facts = {"a": {"growth": 1.25}, "b": {"growth": 1.5}}
    assert PACK.notes(facts, 3) == ["2 of 3 linears are pivoted, with coefficients up to 1.50"]
