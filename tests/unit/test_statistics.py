"""Streaming statistics against their definition on all data at once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import specomp.numerics.statistics
from specomp.numerics.statistics import (
    AbsMean,
    Fisher,
    Gram,
    IOCosine,
    OutputGradGram,
    Precision,
    StackedGram,
    Statistic,
    Stats,
    TokenWeightedGram,
)

DOUBLE = Precision(sums=torch.float64, products=torch.float64)
SINGLE = Precision(sums=torch.float32, products=torch.float32)
HALF = Precision(sums=torch.float32, products=torch.bfloat16)

examples = settings(deadline=None, max_examples=50, derandomize=True, database=None)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def run(
    statistic: Statistic, batches, precision: Precision = DOUBLE, num_samples: int | None = None
) -> Tensor:
    """The value after these batches, each a tensor or a tuple of tensors."""
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    accumulator = statistic.start(precision, num_samples or sum(len(batch[0]) for batch in batches))
    for batch in batches:
        accumulator.update(*batch)
    return accumulator.value()


def product(x: Tensor) -> Tensor:
    """X^T X of all tokens, x (batch, length, n)."""
    flat = x.flatten(0, -2).double()
    return flat.T @ flat


@st.composite
def splits(draw) -> tuple[Tensor, list[int]]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    return randn(
        sum(sizes),
        draw(st.integers(1, 7)),
        draw(st.integers(1, 24)),
        seed=draw(st.integers(0, 999)),
    ), sizes


@examples
@given(
    splits(),
    st.sampled_from([(DOUBLE, 1e-12), (SINGLE, 1e-5), (HALF, 3e-2)]),
    st.sampled_from([1, 5, 192]),
)
def test_gram_of_any_split_is_the_product_of_all_tokens(split, precision, block):
    (x, sizes), (dtypes, tolerance) = split, precision
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specomp.numerics.statistics, "GRAM_BLOCK", block)
        gram = run(Gram(), x.split(sizes), dtypes)
    assert gram.dtype == dtypes.sums
    assert torch.equal(gram, gram.T)
    assert float((gram.double() - product(x)).norm()) <= tolerance * float(product(x).norm())


def test_gram_in_blocks_and_in_long_half_precision_batches():
    n = specomp.numerics.statistics.GRAM_BLOCK + 40
    tokens = specomp.numerics.statistics.PRODUCT_TOKENS + 100
    x = randn(1, tokens, n)
    for precision, tolerance in ((DOUBLE, 1e-12), (SINGLE, 1e-5), (HALF, 1e-2)):
        gram = run(Gram(), [x], precision)
        assert torch.equal(gram, gram.T)
        assert float((gram.double() - product(x)).norm()) <= tolerance * float(product(x).norm())


def test_gram_is_order_free_and_adds_up():
    parts = [randn(2, 5, 6, seed=seed) for seed in range(4)]
    whole = run(Gram(), parts)
    assert torch.allclose(run(Gram(), parts[::-1]), whole, rtol=1e-12)
    assert torch.allclose(run(Gram(), parts[:1]) + run(Gram(), parts[1:]), whole, rtol=1e-12)
    # Neither centred nor divided by the number of tokens.
    assert torch.allclose(run(Gram(), parts + parts), 2 * whole, rtol=1e-12)
    assert torch.equal(
        run(Gram(), [torch.full((1, 3, 2), 2.0)]), torch.full((2, 2), 12.0, dtype=torch.float64)
    )


def test_products_of_output_gradients_are_never_rounded_to_half_precision():
    gradients = randn(2, 50, 6, dtype=torch.float32) * 1e-6
    found = run(OutputGradGram(), [gradients], HALF)
    assert float((found.double() - product(gradients)).norm()) <= 1e-6 * float(
        product(gradients).norm()
    )


def test_gram_value_can_be_read_on_the_way():
    accumulator = Gram().start(DOUBLE, 2)
    x = randn(2, 3, 4)
    accumulator.update(x[:1])
    first = accumulator.value().clone()
    accumulator.update(x[1:])
    assert torch.allclose(first, product(x[:1]))
    assert torch.allclose(accumulator.value(), product(x))


def test_float32_sums_of_half_precision_inputs_keep_small_terms():
    # 4096 tokens of 1 and bfloat16 sums would stop at 256.
    gram = run(Gram(), [torch.ones(1, 4096, 2, dtype=torch.bfloat16)], HALF)
    assert torch.equal(gram, torch.full((2, 2), 4096.0))


@pytest.mark.parametrize("statistic", [Gram(), AbsMean(), IOCosine(), Fisher("in")])
def test_no_data_has_no_value(statistic):
    with pytest.raises(AssertionError, match="no data"):
        statistic.start(DOUBLE, 1).value()


# Stack-of-batch.


def test_as_many_buckets_as_samples_is_the_gram():
    x = randn(6, 5, 4)
    torch.testing.assert_close(run(StackedGram(6), x.split(2)), product(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_samples", "num_buckets"), [(6, 2), (8, 8), (8, 1), (7, 3), (5, 4), (3, 16)]
)
def test_identical_samples_keep_their_gram_per_bucket(num_samples, num_buckets):
    sample = randn(1, 5, 4)
    x = sample.expand(num_samples, 5, 4)
    size = math.ceil(num_samples / num_buckets)
    buckets = math.ceil(num_samples / size)
    stacked = run(StackedGram(num_buckets), [x])
    torch.testing.assert_close(stacked, buckets * product(sample), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stacked / buckets, product(x) / num_samples, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_buckets_are_consecutive_samples_averaged_by_position(batch):
    x = randn(7, 4, 5)
    means = [
        x[:3].mean(0),
        x[3:6].mean(0),
        x[6:].mean(0),
    ]  # ceil(7 / 3) = 3, the last bucket is smaller
    expected = sum(product(mean[None]) for mean in means)
    torch.testing.assert_close(
        run(StackedGram(3), x.split(batch), num_samples=7), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("b", [4, 16])
def test_averaging_independent_samples_shrinks_the_covariance_and_keeps_the_mean(b):
    num_buckets, n = 64, 4
    mean = torch.tensor([3.0, -2.0, 0.0, 1.0], dtype=torch.float64)
    x = mean + randn(num_buckets * b, 8, n)
    tokens = num_buckets * 8
    stacked = run(StackedGram(num_buckets), x.split(32)) / tokens
    full = product(x) / (tokens * b)
    identity = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(full, torch.outer(mean, mean) + identity, rtol=0, atol=0.35)
    excess = stacked - torch.outer(x.mean((0, 1)), x.mean((0, 1)))
    torch.testing.assert_close(excess, identity / b, rtol=0, atol=0.35 / b)


def test_stacked_grams_are_named_by_their_buckets():
    assert StackedGram(4).name != StackedGram(8).name
    assert StackedGram(4) == StackedGram(4)
    accumulator = StackedGram(2).start(SINGLE, 4)
    with pytest.raises(AssertionError, match="no data"):
        accumulator.value()


# Means.


@examples
@given(splits())
def test_abs_mean_of_any_split(split):
    x, sizes = split
    torch.testing.assert_close(run(AbsMean(), x.split(sizes)), x.abs().mean((0, 1)))


@examples
@given(splits())
def test_io_cosine_of_any_split(split):
    x, sizes = split
    y = x + randn(*x.shape, seed=1000)
    expected = ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()
    batches = zip(x.split(sizes), y.split(sizes), strict=True)
    torch.testing.assert_close(run(IOCosine(), batches), expected, rtol=1e-9, atol=1e-9)


def test_io_cosine_of_known_directions():
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0]]])
    y = torch.tensor([[[5.0, 0.0], [0.0, -1.0], [1.0, -1.0], [3.0, 3.0]]])
    assert float(run(IOCosine(), [(x, y)])) == pytest.approx((1 - 1 + 0 + 0.5**0.5) / 4)


@pytest.mark.parametrize(("side", "axis"), [("in", 0), ("out", 1)])
def test_fisher_is_the_mean_of_summed_squared_gradients(side, axis):
    grads = [randn(5, 3, seed=seed) for seed in range(4)]
    expected = torch.stack([grad.square().sum(axis) for grad in grads]).mean(0)
    found = run(Fisher(side), grads)
    assert found.shape == ((3,) if side == "in" else (5,))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_fisher_of_half_precision_gradients_does_not_underflow():
    grad = torch.full((4, 2), 1e-5, dtype=torch.float16)
    found = run(Fisher("in"), [grad], SINGLE)
    assert float((grad**2).sum()) == 0
    torch.testing.assert_close(found, grad.float().square().sum(0))
    assert bool((found > 0).all())


# Descriptions.


def test_descriptions_are_hashable_and_their_names_differ():
    statistics = [
        Gram(),
        StackedGram(4),
        AbsMean(),
        IOCosine(),
        Fisher("in"),
        Fisher("out"),
        OutputGradGram(),
        TokenWeightedGram("in"),
    ]
    assert len({statistic.name for statistic in statistics}) == len(set(statistics)) == 8
    assert [statistic.scope for statistic in statistics] == [
        "site",
        "site",
        "site",
        "decoder_layer",
        "linear",
        "linear",
        "output",
        "output",
    ]


def test_stats_is_a_read_only_copy():
    values = {Gram(): torch.ones(1)}
    stats = Stats(values)
    values[AbsMean()] = torch.zeros(1)
    assert list(stats) == [Gram()]
    assert len(stats) == 1
    assert stats[Gram()].item() == 1
    with pytest.raises(KeyError):
        stats[AbsMean()]
