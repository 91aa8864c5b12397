"""AWQ against the published search as a reader would write it down, on equal inputs; and what is
stored.
"""

import pytest
import torch
from tiny import tiny_model
from units import unit

import specomp
from specomp import rows
from specomp.errors import UserError
from specomp.forms.factors import Factors
from specomp.forms.prices import bits, parts_of
from specomp.models.modules import GridLinear
from specomp.numerics.factors import GramNorm
from specomp.numerics.statistics import AbsMean, Gram, Stats
from specomp.quantization.rtn import Spacing
from specomp.quantization.scaled import ScaledLinear, scales_for
from specomp.slots import Chain


def problem(m=24, n=96, tokens=500):
    torch.manual_seed(0)
    X = torch.randn(tokens, n) * torch.logspace(-1, 1.5, n)[torch.randperm(n)]
    return torch.randn(m, n), X


def published(W, X, bits, group, steps=20):
    """arXiv:2306.00978, Eq. 4 and 5, as its code does it: pseudo-quantized weights with zeros,
    errors of the outputs themselves, no Gram matrix.
    """
    size, expected, found = X.abs().mean(0), X @ W.T, []
    for step in range(steps):
        s = size.pow(step / steps).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        w = (W * s).reshape(-1, group)
        high, low = w.amax(1, keepdim=True), w.amin(1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / (2**bits - 1)
        zero = (-(low / scale).round()).clamp(0, 2**bits - 1)
        q = (w / scale).round().add(zero).clamp(0, 2**bits - 1)
        rounded = ((q - zero) * scale).reshape(W.shape) / s
        found.append((float((X @ rounded.T - expected).square().mean()), s, rounded))
    return min(found, key=lambda x: x[0]), [x[0] for x in found]


@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_is_the_published_one(bits):
    W, X = problem()
    (least, s, rounded), errors = published(W, X, bits, 32)
    spacing = Spacing(bits=bits, group_size=32, symmetric=False, scale_dtype=torch.float16)
    G = (X.T @ X).double()
    scale = scales_for(W, G, X.abs().mean(0), 20, spacing)
    assert torch.allclose(scale.float(), 1 / s, rtol=1e-3)
    assert least < 0.8 * errors[0], "it has something to find"
    quantizer = rows.slot("quantizer", "awq_int4", bits=bits, group_size=32, search=0)
    stats = Stats({Gram(): G, AbsMean(): X.abs().mean(0)})
    (found,) = quantizer(Chain((W,), lambda x: x), stats, torch.float32)
    lost = GramNorm(G).loss((found.values - W).double()) ** 2 / X.shape[0] / W.shape[0]
    assert lost == pytest.approx(least, rel=0.02)  # scales of 16 bits
    # an integer differs where a scale of 16 bits moved it over a half
    assert ((found.values - rounded).abs() < 1e-2).double().mean() > 0.98


def test_a_search_for_ranges_and_feedback_go_on_top():
    W, X = problem()
    stats = Stats({Gram(): (X.T @ X).double(), AbsMean(): X.abs().mean(0)})
    norm = GramNorm(stats[Gram()])

    def lost(**settings):
        made = rows.slot("quantizer", "awq_int4", bits=3, group_size=32, **settings)
        (found,) = made(Chain((W,), lambda x: x), stats, torch.float32)
        return norm.loss((found.values - W).double())

    assert lost() < lost(search=0) < 0.9 * lost(search=0, scaling=0)
    assert lost(algorithm="gptq", damping=0.01, act_order=True) < lost()


def test_each_of_a_chain_has_scales_of_its_own():
    """The second matrix sees what the first puts out, whose size is the root of its energy."""
    W, X = problem()
    Vt, U = torch.randn(12, 96), torch.randn(24, 12)
    stats = Stats({Gram(): (X.T @ X).double(), AbsMean(): X.abs().mean(0)})
    quantizer = rows.slot("quantizer", "awq_int4", group_size=8)
    first, second = quantizer(Chain((Vt, U), lambda a, b: b @ a), stats, torch.float32)
    assert first.scale.shape == (96,) and second.scale.shape == (12,)
    without = Stats({Gram(): stats[Gram()]})  # as for inputs that a matrix makes
    (other, _) = quantizer(Chain((Vt, U), lambda a, b: b @ a), without, torch.float32)
    assert not torch.equal(other.scale, first.scale)


def test_the_module_is_the_linear_of_its_weight():
    torch.manual_seed(0)
    inner, scale, x = torch.nn.Linear(6, 5), torch.rand(6).half() + 1, torch.randn(3, 6)
    made = ScaledLinear.of(inner, scale)
    W = inner.weight * scale.float()
    assert torch.allclose(made.merged_weight(), W)
    assert torch.allclose(made(x), torch.nn.functional.linear(x, W, inner.bias), atol=1e-6)
    assert made.shards("colwise") == {"inner": "colwise"} and made.shards("rowwise") is None


TOKENS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("export", ["factors", "dense"])
@pytest.mark.parametrize(
    ("row", "ratio"),
    [("dense", 0.0), ("svd_llm", 0.2), ("specomp_low_rank", 0.3), ("specomp", 0.4)],
)
def test_what_is_stored_is_priced_and_comes_back(tmp_path, row, ratio, export):
    """In full, as two factors, as pivots and in cut MLPs."""
    model = tiny_model("llama")
    method = specomp.method(row, quantizer="awq_int4")
    report = specomp.compress(model, TOKENS, method, ratio)
    scaled = [x for x in model.modules() if isinstance(x, ScaledLinear)]
    assert scaled and all(isinstance(x.inner, GridLinear) for x in scaled)
    grid = rows.slot("quantizer", "awq_int4").grid
    for x in report.linears:
        module = model.get_submodule(x.name)
        if row == "svd_llm" and not x.dense:
            parts = Factors().parts(unit(x.name, x.m, x.n), x.rank, grid)
            assert bits(parts, torch.float32) == bits(parts_of(module), torch.float32)
    if (row, export) == ("specomp", "dense"):  # MLPs of several sizes have no plain form
        return
    specomp.save(model, tmp_path / "out", form=export)
    again = specomp.load(tmp_path / "out").model
    with torch.no_grad():
        lost = (again(TOKENS).logits - model(TOKENS).logits).abs().max()
    assert lost == 0 if export == "factors" else lost < 1e-5


def test_a_free_basis_is_rebalanced_before_it_is_scaled():
    W, X = problem()
    stats = Stats({Gram(): (X.T @ X).double(), AbsMean(): X.abs().mean(0)})
    chain = Chain((torch.randn(12, 96), torch.randn(24, 12)), lambda a, b: b @ a, free_basis=True)
    found = [
        rows.slot("quantizer", "awq_int4", group_size=8, rebalance=x)(chain, stats, torch.float32)
        for x in (True, False)
    ]
    assert not torch.equal(found[0][0].values, found[1][0].values)


@pytest.mark.parametrize("quantizer", ["awq_int4", "nf4"])
def test_cut_attention_and_what_is_counted_and_split(quantizer):
    model = tiny_model("llama")
    method = specomp.method("specomp", units="cut_all", quantizer=quantizer)
    report = specomp.compress(model, TOKENS, method, 0.8)
    small, dense = report.ledger.compressed, report.ledger.dense
    assert small.macs_per_token - small.linear_params == dense.macs_per_token - dense.linear_params
    low = tiny_model("llama")
    specomp.compress(low, TOKENS, "svd_llm", 0.2, quantizer=quantizer)
    module = low.get_submodule(report.linears[0].name)
    split = module.shards("colwise")
    assert split == ({"u_proj.inner": "colwise"} if quantizer == "awq_int4" else None)


def test_masks_have_no_columns_to_scale():
    method = specomp.method("wanda", quantizer="awq_int4")
    with pytest.raises(
        UserError, match="scales columns .AWQ., and what Masked stores has none.*nf4"
    ):
        specomp.compress(tiny_model("llama"), TOKENS, method, 0.5)
