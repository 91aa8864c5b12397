"""Prices: what a form says that it stores, against what the module it makes stores."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from units import Known, unit

from specomp.compression.ledger import measure
from specomp.forms.dense import Dense
from specomp.forms.factors import Factors
from specomp.forms.options import DENSE
from specomp.forms.pivoted import Pivoted
from specomp.forms.prices import Bits, Numbers, Part, Parts, bits, numbers, parts_of
from specomp.models.modules import replace_linear
from specomp.numerics.factors import LowRankFactors
from specomp.numerics.grid import GridSpec
from specomp.quantization.factors import FactorQuantizer
from specomp.quantization.none import NoQuantizer
from specomp.slots import Form

examples = settings(deadline=None, max_examples=25, derandomize=True, database=None)
RANKED = {"factors": Factors(), "pivoted": Pivoted(max_growth=2.0)}
FORMS: dict[str, Form] = {"dense": Dense(), **RANKED}
GRIDS = {
    "none": None,
    "a row": GridSpec(bits=4, group_size=None, symmetric=False),
    "a row, symmetric": GridSpec(bits=8, group_size=None, symmetric=True),
    "groups": GridSpec(bits=3, group_size=16, symmetric=False),
    "groups, symmetric": GridSpec(bits=4, group_size=8, symmetric=True),
}
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(24, 40), (40, 24), (33, 17), (16, 16), (5, 3), (2, 9)]


def quantizer(grid: GridSpec) -> FactorQuantizer:
    """Rounds to the nearest point of this grid."""
    kind = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    how = {"act_order": False, "damping": 0.0, "order": "faithful", "rebalance": False}
    return FactorQuantizer(algorithm="rtn", **kind, **how)


def fitted(
    form: Form,
    m: int,
    n: int,
    size: int,
    *,
    grid: GridSpec | None = None,
    dtype=torch.float32,
    bias=False,
):
    """The module that a form makes of random factors."""
    generator = torch.Generator().manual_seed(size)
    pair = LowRankFactors(
        torch.randn(m, size, generator=generator), torch.randn(size, n, generator=generator)
    )
    rounding = NoQuantizer() if grid is None else quantizer(grid)
    own = torch.randn(m, generator=generator).to(dtype) if bias else None
    evidence = Known(pair=pair, own_bias=own, rounding=rounding, dtype=dtype)
    (module,) = form.fit(unit("x", m, n), size, evidence).values()
    return module


def same(parts: Parts, found: Parts) -> bool:
    """Whether the same tensors are stored the same way; only their names may differ."""

    def sorted_parts(parts: Parts) -> list[tuple]:
        return sorted((tuple(map(int, x.shape)), _spec(x), x.index_bits) for x in parts.values())

    def _spec(part: Part) -> tuple:
        # A row of n numbers in groups of at least n is one group.
        if part.grid is None:
            return ()
        n = int(part.shape[-1])
        return part.grid.bits, min(part.grid.group_size or n, n), part.grid.symmetric

    return sorted_parts(parts) == sorted_parts(found)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_what_a_form_says_is_what_its_module_stores(m, n, form, grid):
    """To the last bit, in every precision, with and without a bias, which is no weight."""
    form, grid, x = FORMS[form], GRIDS[grid], unit("x", m, n)
    offered = form.sizes(x)
    for size in sorted({offered[0], offered[len(offered) // 2], offered[-1]}):
        said = form.parts(x, size, grid)
        for dtype, bias in itertools.product(DTYPES, (False, True)):
            module = fitted(form, m, n, size, grid=grid, dtype=dtype, bias=bias)
            found = parts_of(module)
            assert numbers(said) == numbers(found)
            assert bits(said, dtype) == bits(found, dtype)
            assert same(said, found)
            weights = {k: v for k, v in module.state_dict().items() if not k.endswith("bias")}
            indices = {k for k, _ in module.named_buffers()}
            assert numbers(said) == sum(v.numel() for k, v in weights.items() if k not in indices)
            if grid is None:
                assert bits(said, dtype) == 8 * sum(v.nbytes for v in weights.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("form", RANKED)
def test_the_ledger_counts_the_same(form, grid, dtype):
    """A model of three linears, one of them dense."""
    form, grid = RANKED[form], GRIDS[grid]
    shapes = {"0": (24, 40, 7), "1": (18, 24, 5), "2": (9, 18, 9)}
    units = [unit(name, m, n) for name, (m, n, _) in shapes.items()]
    model = nn.Sequential(*(nn.Linear(n, m, dtype=dtype) for m, n, _ in shapes.values()))
    parts = {}
    for x, (m, n, size) in zip(units, shapes.values(), strict=True):
        chosen = DENSE if size == min(m, n) else form
        if chosen is form:
            replace_linear(
                model, x.name, fitted(form, m, n, size, grid=grid, dtype=dtype, bias=True)
            )
        parts |= {f"{x.name}.{k}": part for k, part in chosen.parts(x, size, grid).items()}
    size = measure(model, [x.linears[0] for x in units])
    biases = sum(8 * dtype.itemsize * m for m, _, _ in shapes.values())
    assert size.linear_params == numbers(parts)
    assert size.linear_bits == bits(parts, dtype)
    assert 8 * size.model_bytes == bits(parts, dtype) + biases


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("form", RANKED)
@examples
@given(m=st.integers(2, 300), n=st.integers(2, 300))
def test_tensors_of_sizes_cost_what_each_costs(form, grid, m, n):
    form, grid, x = RANKED[form], GRIDS[grid], unit("x", m, n)
    ranks = list(form.sizes(x))
    at_once = form.parts(x, torch.tensor(ranks, dtype=torch.int64), grid)
    one_by_one = [form.parts(x, rank, grid) for rank in ranks]
    count = torch.as_tensor(numbers(at_once)).expand(len(ranks))
    assert count.tolist() == [numbers(parts) for parts in one_by_one]
    for dtype in DTYPES:
        total = torch.as_tensor(bits(at_once, dtype)).expand(len(ranks))
        assert total.tolist() == [bits(parts, dtype) for parts in one_by_one]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("form", RANKED)
def test_many_linears_cost_what_each_costs(form, grid):
    """Sides and ranks together, also in the float64 of a gate budget, which takes a gradient."""
    form, grid = RANKED[form], GRIDS[grid]
    sizes = [(m, n, rank) for m, n in SHAPES for rank in (1, min(m, n) - 1)]
    each = [numbers(form.shapes(m, n, rank, grid)) for m, n, rank in sizes]
    for dtype in (torch.int64, torch.float64):
        m, n, rank = torch.tensor(sizes, dtype=dtype).unbind(1)
        assert numbers(form.shapes(m, n, rank, grid)).tolist() == each
    if grid is None:
        m, n, rank = (
            x.clone().requires_grad_() for x in torch.tensor(sizes, dtype=torch.float64).unbind(1)
        )
        numbers(form.shapes(m, n, rank, grid)).sum().backward()
        slope = m + n if form == Factors() else m + n - 2 * rank
        assert torch.allclose(rank.grad, slope.detach())


def test_prices_by_hand():
    x = unit("x", 30, 60)
    spec = GridSpec(bits=4, group_size=None, symmetric=False)
    assert numbers(DENSE.parts(x, 0)) == 1800
    assert numbers(Factors().parts(x, 5)) == numbers(Factors().parts(x, 5, spec)) == 5 * 90
    pivoted = RANKED["pivoted"]
    assert numbers(pivoted.parts(x, 5)) == 5 * (90 - 5)
    assert numbers(pivoted.shapes(30, 60, 30, None)) == 1800, "nothing is added at full rank"
    assert bits(DENSE.parts(x, 0), torch.bfloat16) == 16 * 1800
    assert bits(Factors().parts(x, 5), torch.float32) == 32 * 5 * 90
    assert bits(pivoted.parts(x, 5), torch.bfloat16) == 16 * 5 * 85 + 32 * 30
    # Vt: 5 rows of 60 numbers in 8 words; U: 30 rows of 5 in one; scale and zero of a row; shapes.
    rounded = 5 * (4 * 8 + 3) + 30 * (4 * 1 + 3) + 2 * 16
    assert bits(Factors().parts(x, 5, spec), torch.float32) == 8 * rounded


def test_dense_is_never_rounded_and_of_all_sizes_alike():
    x, spec = unit("x", 6, 4), GridSpec(bits=4, group_size=None, symmetric=True)
    assert DENSE.parts(x, 0, spec) == DENSE.parts(x, 4)
    assert list(DENSE.sizes(x)) == [4]


def test_what_is_not_stored_costs_nothing():
    module = fitted(RANKED["pivoted"], 6, 9, 3, bias=True)
    before = parts_of(module)
    module.register_buffer("scratch", torch.zeros(99), persistent=False)
    assert parts_of(module) == before
    assert set(before) == {"pivots.weight", "others.weight", "order"}
    assert before["order"] == Part((6,), index_bits=32)


# The two currencies.


def test_a_budget_of_parameters():
    budget, x = Numbers(compression=0.4), unit("x", 30, 60)
    parts = Factors().parts(x, 5, GRIDS["a row"])
    assert all(budget.price(parts, dtype) == 450 for dtype in DTYPES)
    assert all(budget.share(dtype) == budget.retention == pytest.approx(0.6) for dtype in DTYPES)
    assert (budget.setting, str(budget)) == ("ratio.compression=0.4", "compression 40%")
    assert budget.identity() == {"compression": 0.4}
    assert budget.ledger(16) == {"target_retention": budget.retention, "target_compression": 0.4}


def test_a_budget_of_bits():
    budget, x = Bits(bits=4), unit("x", 30, 60)
    for form, grid, dtype in itertools.product(RANKED.values(), GRIDS.values(), DTYPES):
        parts = form.parts(x, 5, grid)
        assert budget.price(parts, dtype) == bits(parts, dtype)
    assert [budget.share(dtype) for dtype in DTYPES] == [4 / 32, 4 / 16]
    assert Bits(bits=64).share(torch.float32) == 1, "dense is all there is"
    assert (budget.setting, str(budget)) == ("ratio.bits=4", "4 bits a weight")
    assert budget.identity() == {"bits": 4}
    assert budget.ledger(16) == {"target_retention": 0.25, "target_bits": 4}
    assert Bits(bits=64).ledger(16) == {"target_retention": 1.0, "target_bits": 64}


@pytest.mark.parametrize("wrong", [0, -1, "much", float("nan")])
def test_bits_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match="bits"):
        Bits(bits=wrong)
