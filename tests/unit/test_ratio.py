"""Ratios, ranks, and the one place where retention is made from compression."""

import ast
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import specomp
from specomp.numerics.ratio import (
    Ratio,
    break_even_rank,
    is_low_rank,
    pair_cost,
    pivoted_cost,
    rank_for_retention,
    retained,
    retention_of_rank,
)

# Ranks of LLaMA-7B's 4096 x 4096 and 4096 x 11008 matrices by percent kept.
LLAMA_7B = {80: (1638, 2388), 60: (1228, 1791), 50: (1024, 1492), 40: (819, 1194), 30: (614, 895), 20: (409, 597)}

examples = settings(deadline=None, max_examples=100, derandomize=True, database=None)
sizes = st.integers(1, 5000)


@pytest.mark.parametrize(("percent", "ranks"), LLAMA_7B.items())
def test_llama_7b_ranks_are_the_published_ones(percent, ranks):
    for retention in (percent / 100, Ratio(compression=(100 - percent) / 100).retention):
        assert rank_for_retention(4096, 4096, retention) == ranks[0]
        assert rank_for_retention(4096, 11008, retention) == rank_for_retention(11008, 4096, retention) == ranks[1]


def test_break_even_of_llama_7b():
    assert break_even_rank(4096, 4096) == 2048
    assert break_even_rank(4096, 11008) == pytest.approx(2985.2, abs=0.05)
    # Keeping every component of the seven linears costs 1.58 times the dense decoder layer.
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert sum(min(m, n) * (m + n) for m, n in shapes) / sum(m * n for m, n in shapes) == pytest.approx(1.58, abs=0.005)


def test_binary_fractions_do_not_lose_a_rank():
    retention = Ratio(compression=0.8).retention
    assert retention < 0.2
    assert retention * 100 * 100 / 200 < 10
    assert rank_for_retention(100, 100, retention) == 10
    assert rank_for_retention(1000, 1000, 0.6) == 300


@examples
@given(sizes, sizes, st.integers(0, 99))
def test_rank_is_the_exact_floor_of_decimal_ratios(m, n, percent):
    exact = math.floor(Fraction(100 - percent, 100) * m * n / (m + n))
    assert rank_for_retention(m, n, Ratio(compression=percent / 100).retention) == exact


@examples
@given(sizes, sizes, st.floats(0.01, 0.99))
def test_rank_is_the_largest_that_the_retention_pays_for(m, n, retention):
    rank = rank_for_retention(m, n, retention)
    assert retention_of_rank(m, n, rank) <= retention + 1e-9
    assert retention_of_rank(m, n, rank + 1) > retention - 1e-9


@examples
@given(sizes, sizes, st.floats(0.01, 0.99))
def test_two_factors_are_priced_by_the_published_formula(m, n, retention):
    assert rank_for_retention(m, n, retention, pair_cost) == math.floor(retention * m * n / (m + n) + 1e-9)


@examples
@given(sizes, sizes, st.floats(0.01, 0.99))
def test_pivots_buy_at_least_the_rank_of_two_factors(m, n, retention):
    rank = rank_for_retention(m, n, retention, pivoted_cost)
    assert rank >= rank_for_retention(m, n, retention)
    assert pivoted_cost(m, n, rank) <= retention * m * n + 1e-9 * (m + n)
    assert rank == min(m, n) or pivoted_cost(m, n, rank + 1) > retention * m * n


@examples
@given(sizes, sizes)
def test_pivots_cost_nothing_at_full_rank(m, n):
    assert pivoted_cost(m, n, min(m, n)) == m * n
    assert not is_low_rank(m, n, min(m, n), pivoted_cost)
    assert min(m, n) == 1 or is_low_rank(m, n, min(m, n) - 1, pivoted_cost)


@examples
@given(sizes, sizes, st.integers(0, 5000))
def test_low_rank_means_fewer_parameters_than_dense(m, n, rank):
    assert is_low_rank(m, n, rank) == (rank * (m + n) < m * n)
    assert not is_low_rank(m, n, min(m, n))


def test_factors_that_only_break_even_are_not_low_rank():
    assert [is_low_rank(30, 60, rank) for rank in (19, 20, 21)] == [True, False, False]


@pytest.mark.parametrize("compression", [-0.1, 1, 1.2, "much", float("nan")])
def test_compression_out_of_range_is_refused(compression):
    with pytest.raises(ValidationError, match="compression"):
        Ratio(compression=compression)


def test_dense_is_compression_zero():
    assert Ratio(compression=0).retention == 1


def one_minus(source: str) -> list[str]:
    """What is subtracted from a literal 1 in a source text."""
    return [
        ast.unparse(node.right)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and isinstance(node.left, ast.Constant) and node.left.value == 1
    ]


def test_retention_is_made_from_compression_once_in_the_package():
    words = ("compression", "retention", "ratio", "removed", "share")
    found = []
    for path in sorted(Path(specomp.__file__).parent.rglob("*.py")):
        subtracted = one_minus(path.read_text(encoding="utf-8"))
        found += [(path.name, operand) for operand in subtracted if any(word in operand.lower() for word in words)]
    assert found == [("ratio.py", "compression")]
    assert retained(0.25) == 0.75
